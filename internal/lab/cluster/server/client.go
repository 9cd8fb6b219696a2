package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// timeout is what a call may take that moves little data.
const timeout = 3 * time.Second

// call does what the client's arguments say and prints the answer.
func call(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "get":
		return get(args[1], os.Stdout)
	case len(args) == 2 && args[0] == "hash":
		hash := sha256.New()
		n := &counter{w: hash}
		if err := get(args[1], n); err != nil {
			return err
		}
		fmt.Printf("bytes=%d sha256=%x\n", n.bytes, hash.Sum(nil))
		return nil
	case len(args) == 3 && args[0] == "send":
		return send(args[1], args[2])
	case len(args) == 4 && args[0] == "echo":
		return echo(args[1], args[2], args[3])
	case len(args) == 3 && args[0] == "lookup":
		return lookup(args[1], args[2])
	}
	return fmt.Errorf("unknown arguments %q: see the documentation of package server", args)
}

// client waits not long for a connection, but as long as it takes for what comes after:
// large transfers are slow on a busy machine. Certificates are not checked.
var client = &http.Client{Transport: &http.Transport{
	TLSClientConfig:       &tls.Config{InsecureSkipVerify: true},
	DialContext:           (&net.Dialer{Timeout: timeout}).DialContext,
	ResponseHeaderTimeout: 2 * time.Minute,
}}

func get(url string, to io.Writer) error {
	return answer(client.Get(url))(to) //nolint:bodyclose,noctx // answer closes it
}

func send(url, size string) error {
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil {
		return err
	}
	return answer(client.Post(url, "application/octet-stream", io.LimitReader(&pattern{}, n)))(os.Stdout) //nolint:bodyclose,noctx // answer closes it
}

func answer(r *http.Response, err error) func(io.Writer) error {
	return func(to io.Writer) error {
		if err != nil {
			return err
		}
		defer r.Body.Close()
		if _, err := io.Copy(to, r.Body); err != nil {
			return err
		}
		if r.StatusCode != http.StatusOK {
			return errors.New(r.Status)
		}
		return nil
	}
}

// echo sends a text and prints the answer: for TCP the line that the server begins with and
// the text that came back, for UDP the packet.
func echo(network, address, text string) error {
	c, err := net.DialTimeout(network, address, timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c, "%s\n", text); err != nil {
		return err
	}
	r := bufio.NewReader(c)
	lines := 1
	if strings.HasPrefix(network, "tcp") {
		lines = 2
	}
	for range lines {
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		fmt.Print(line)
	}
	return nil
}

// lookup asks a DNS server over UDP for the addresses of a name.
func lookup(name, server string) error {
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, net.JoinHostPort(server, "53"))
	}}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	found, err := r.LookupHost(ctx, name)
	if err != nil {
		return err
	}
	fmt.Println(strings.Join(found, "\n"))
	return nil
}

type counter struct {
	w     io.Writer
	bytes int64
}

func (c *counter) Write(b []byte) (int, error) {
	c.bytes += int64(len(b))
	return c.w.Write(b)
}

// Package podapi is the way to the API server for programs in a pod that link no Kubernetes
// client: a hub, spoke, egress or front reads and writes a handful of objects, each by
// its name, and is to stay small.
//
// It speaks JSON over HTTPS as the pod's service account. It knows no kinds: objects are
// what the caller decodes them into.
package podapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Directory is where Kubernetes puts a pod's service account.
const Directory = "/var/run/secrets/kubernetes.io/serviceaccount"

// ErrNotFound and ErrConflict are answers that callers tell from others: there is no such
// object, and somebody else has written it in the meantime.
var (
	ErrNotFound = errors.New("there is no such object")
	ErrConflict = errors.New("somebody else has written it meanwhile")
)

// Client talks to one API server. Make it with New.
type Client struct {
	host      string // https://HOST:PORT
	token     string // file; read anew for each request, since kubelet replaces it
	http      *http.Client
	namespace string
}

// New makes a client of the pod's service account, found in dir (empty: Directory) and by
// KUBERNETES_SERVICE_HOST and _PORT. Nothing is sent yet.
func New(dir string) (*Client, error) {
	if dir == "" {
		dir = Directory
	}
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("this is no pod of a cluster: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set")
	}
	authorities, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("service account of this pod: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(authorities) {
		return nil, fmt.Errorf("service account of this pod: %s/ca.crt holds no certificate", dir)
	}
	ns, err := os.ReadFile(filepath.Join(dir, "namespace"))
	if err != nil {
		return nil, fmt.Errorf("service account of this pod: %w", err)
	}
	return &Client{
		host: "https://" + net.JoinHostPort(host, port), token: filepath.Join(dir, "token"), namespace: strings.TrimSpace(string(ns)),
		http: &http.Client{Transport: &http.Transport{
			TLSClientConfig:       &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
			DialContext:           (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
			TLSHandshakeTimeout:   5 * time.Second,
			ResponseHeaderTimeout: 15 * time.Second,
			IdleConnTimeout:       30 * time.Second,
			MaxIdleConnsPerHost:   1,
		}},
	}, nil
}

// Namespace is the pod's.
func (c *Client) Namespace() string { return c.namespace }

// Secret is the path of a Secret, ConfigMap that of a ConfigMap, RemoteCluster that of a
// RemoteCluster.
func Secret(namespace, name string) string {
	return "/api/v1/namespaces/" + namespace + "/secrets/" + name
}

// ConfigMap is the path of a ConfigMap.
func ConfigMap(namespace, name string) string {
	return "/api/v1/namespaces/" + namespace + "/configmaps/" + name
}

// RemoteCluster is the path of a RemoteCluster.
func RemoteCluster(namespace, name string) string {
	return "/apis/culvert.dev/v1alpha1/namespaces/" + namespace + "/remoteclusters/" + name
}

// Get reads an object.
func (c *Client) Get(ctx context.Context, path string, into any) error {
	return c.ask(ctx, request{method: http.MethodGet, path: path}, into)
}

// Replace writes an object that was read before; with its resourceVersion the error is
// ErrConflict when somebody else has written it since. into may be nil.
func (c *Client) Replace(ctx context.Context, path string, object, into any) error {
	return c.ask(ctx, request{method: http.MethodPut, path: path, body: object, contentType: "application/json"}, into)
}

// Apply is a server-side apply; without force, what another manager says otherwise is
// ErrConflict. into may be nil.
func (c *Client) Apply(ctx context.Context, path, manager string, force bool, object, into any) error {
	q := url.Values{"fieldManager": {manager}}
	if force {
		q.Set("force", "true")
	}
	return c.ask(ctx, request{method: http.MethodPatch, path: path + "?" + q.Encode(), body: object, contentType: "application/apply-patch+yaml"}, into)
}

type request struct {
	method, path, contentType string
	body                      any
}

// largest is the largest answer that is read: what an API server stores at most, and more.
const largest = 8 << 20

// askTimeout is for one request that is not a watch.
const askTimeout = 20 * time.Second

func (c *Client) ask(ctx context.Context, r request, into any) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	res, err := c.do(ctx, r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, largest))
	if err != nil {
		return fmt.Errorf("API server: %w", err)
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("API server: answer to %s: %w", r.path, err)
	}
	return nil
}

// do sends a request; an answer that is no success is an error.
func (c *Client) do(ctx context.Context, r request) (*http.Response, error) {
	var body io.Reader
	if r.body != nil {
		b, err := json.Marshal(r.body)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, c.host+r.path, body)
	if err != nil {
		return nil, err
	}
	token, err := os.ReadFile(c.token)
	if err != nil {
		return nil, fmt.Errorf("service account of this pod: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "culvert-tunnel")
	if r.contentType != "" {
		req.Header.Set("Content-Type", r.contentType)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("API server: %w", err)
	}
	if res.StatusCode/100 == 2 {
		return res, nil
	}
	defer res.Body.Close()
	return nil, refusal(res)
}

// refusal is what an API server says in its Status.
func refusal(res *http.Response) error {
	var status struct {
		Message string `json:"message"`
	}
	b, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	if json.Unmarshal(b, &status) != nil || status.Message == "" {
		status.Message = res.Status
	}
	switch res.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("API server: %s: %w", status.Message, ErrNotFound)
	case http.StatusConflict:
		return fmt.Errorf("API server: %s: %w", status.Message, ErrConflict)
	}
	return fmt.Errorf("API server: %s", status.Message)
}

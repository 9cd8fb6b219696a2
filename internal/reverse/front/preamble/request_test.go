package preamble

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	proxyproto "github.com/pires/go-proxyproto"
)

func TestRequest(t *testing.T) {
	want := Request{"hub-0.example.com", 443}
	for name, text := range map[string]string{
		"curl":    "CONNECT hub-0.example.com:443 HTTP/1.1\r\nHost: hub-0.example.com:443\r\nUser-Agent: curl/7.88.1\r\nProxy-Connection: Keep-Alive\r\n\r\n",
		"OpenVPN": "CONNECT hub-0.example.com:443 HTTP/1.0\r\nHost: hub-0.example.com\r\n\r\n",
		"bare":    "CONNECT hub-0.example.com:443 HTTP/1.0\r\n\r\n",
		"case":    "CONNECT Hub-0.EXAMPLE.com:443 HTTP/1.1\r\nhOST:hub-0.example.COM\t\r\n\r\n",
		"empty":   "CONNECT hub-0.example.com:443 HTTP/1.1\r\nHost: hub-0.example.com\r\nContent-Length: 0\r\nX:\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			got, n, err := ParseRequest([]byte(text + "what follows"))
			if err != nil || got != want || n != len(text) {
				t.Errorf("%+v, %d, %v", got, n, err)
			}
			for n := range len(text) {
				if _, _, err := ParseRequest([]byte(text[:n])); !errors.Is(err, ErrShort) {
					t.Fatalf("%q: %v, want ErrShort", text[:n], err)
				}
			}
		})
	}
}

func TestRequestRefused(t *testing.T) {
	const line = "CONNECT hub.example.com:443 HTTP/1.1\r\n"
	const host = "Host: hub.example.com\r\n"
	target := func(s string) string { return "CONNECT " + s + " HTTP/1.1\r\nHost: " + s + "\r\n\r\n" }
	for name, c := range map[string]struct {
		text string
		want Reason
	}{
		"GET":                    {"GET / HTTP/1.1\r\n" + host + "\r\n", Method},
		"GET, early":             {"GET /", Method},
		"TRACE":                  {"TRACE hub.example.com:443 HTTP/1.1\r\n", Method},
		"PROXY":                  {"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", Method},
		"HTTP/2":                 {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Method},
		"no method":              {"Connect hub.example.com:443 HTTP/1.1\r\n", Malformed},
		"no port":                {target("hub.example.com"), Malformed},
		"port 0":                 {target("hub.example.com:0"), Malformed},
		"port 65536":             {target("hub.example.com:65536"), Malformed},
		"port 0443":              {target("hub.example.com:0443"), Malformed},
		"port +443":              {target("hub.example.com:+443"), Malformed},
		"two ports":              {target("hub.example.com:443:80"), Malformed},
		"IPv4":                   {target("10.0.0.1:443"), NotAName},
		"short IPv4":             {target("127.1:443"), NotAName},
		"decimal IPv4":           {target("2130706433:443"), NotAName},
		"hexadecimal IPv4":       {target("0x7f000001:443"), NotAName},
		"IPv6":                   {target("[::1]:443"), NotAName},
		"bare IPv6":              {target("::1"), NotAName},
		"mapped IPv4":            {target("[::ffff:127.0.0.1]:443"), NotAName},
		"zone":                   {target("[fe80::1%25eth0]:443"), NotAName},
		"user":                   {target("me@hub.example.com:443"), NotAName},
		"URL":                    {target("https://hub.example.com:443"), Malformed},
		"dot at the end":         {target("hub.example.com.:443"), NotAName},
		"HTTP/2.0":               {"CONNECT hub.example.com:443 HTTP/2.0\r\n" + host + "\r\n", Malformed},
		"HTTP/1.11":              {"CONNECT hub.example.com:443 HTTP/1.11\r\n" + host + "\r\n", Malformed},
		"two spaces":             {"CONNECT  hub.example.com:443 HTTP/1.1\r\n" + host + "\r\n", Malformed},
		"no version":             {"CONNECT hub.example.com:443\r\n" + host + "\r\n", Malformed},
		"bare LF":                {"CONNECT hub.example.com:443 HTTP/1.1\n", Malformed},
		"bare CR":                {"CONNECT hub.example.com:443\rHTTP/1.1", Malformed},
		"NUL":                    {line + "X: \x00", Malformed},
		"no Host":                {line + "\r\n", Malformed},
		"two Hosts":              {line + host + host + "\r\n", Malformed},
		"another Host":           {line + "Host: other.example.com\r\n\r\n", Mismatch},
		"another port":           {line + "Host: hub.example.com:80\r\n\r\n", Mismatch},
		"Host is an address":     {line + "Host: 127.0.0.1\r\n\r\n", Mismatch},
		"empty Host":             {line + "Host:\r\n\r\n", Mismatch},
		"Host of another, 1.0":   {"CONNECT hub.example.com:443 HTTP/1.0\r\nHost: other.example.com\r\n\r\n", Mismatch},
		"content":                {line + host + "Content-Length: 5\r\n\r\n", Malformed},
		"two lengths":            {line + host + "Content-Length: 0\r\nContent-Length: 0\r\n\r\n", Malformed},
		"chunked":                {line + host + "Transfer-Encoding: chunked\r\n\r\n", Malformed},
		"folded":                 {line + host + "X: a\r\n b\r\n\r\n", Malformed},
		"space before the colon": {line + "Host : hub.example.com\r\n\r\n", Malformed},
		"no colon":               {line + host + "nonsense\r\n\r\n", Malformed},
		"no field name":          {line + host + ": x\r\n\r\n", Malformed},
		"control character":      {line + host + "X: a\x1b[0m\r\n\r\n", Malformed},
		"too many fields":        {line + host + strings.Repeat("X: a\r\n", maxHeaders) + "\r\n", Oversized},
		"too large":              {line + host + "X: " + strings.Repeat("a", MaxSize), Oversized},
		"too large, complete":    {line + host + "X: " + strings.Repeat("a", MaxSize) + "\r\n\r\n", Oversized},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := ParseRequest([]byte(c.text))
			var refused *Error
			if !errors.As(err, &refused) || refused.Reason != c.want {
				t.Errorf("%v, want %s", err, c.want)
			}
		})
	}
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte("CONNECT hub-0.example.com:443 HTTP/1.1\r\nHost: hub-0.example.com:443\r\nUser-Agent: curl/7.88.1\r\n\r\nmore"))
	f.Add([]byte("CONNECT hub.example.com:1194 HTTP/1.0\r\n\r\n"))
	f.Add([]byte("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nX-Y: \xff\r\n\r\n"))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, n, err := ParseRequest(b)
		checkError(t, err)
		if err != nil {
			return
		}
		// Go's own reader, which is more lenient, understands the same.
		r := bufio.NewReader(bytes.NewReader(b))
		request, err := http.ReadRequest(r)
		if err != nil {
			t.Fatalf("accepted, but Go says: %v", err)
		}
		host := fmt.Sprintf("%s:%d", got.Name, got.Port)
		if request.Method != http.MethodConnect || !strings.EqualFold(request.URL.Host, host) || request.ContentLength > 0 {
			t.Fatalf("read %s, Go reads %s %s", host, request.Method, request.URL.Host)
		}
		if consumed := len(b) - r.Buffered(); len(b) < 4096 && consumed != n {
			t.Fatalf("takes %d bytes, for Go %d", n, consumed)
		}
		for i := range n {
			if _, _, err := ParseRequest(b[:i]); !errors.Is(err, ErrShort) {
				t.Fatalf("%d of %d bytes: %v", i, n, err)
			}
		}
	})
}

func TestProxy(t *testing.T) {
	ap := netip.MustParseAddrPort
	v4 := Proxied{ap("192.0.2.1:1000"), ap("198.51.100.1:443")}
	v6 := Proxied{ap("[2001:db8::1]:1000"), ap("[2001:db8::2]:443")}
	for _, p := range []Proxied{v4, v6, {}} {
		for version := 1; version <= 2; version++ {
			b, err := AppendProxy(nil, version, p, "hub.example.com")
			if err != nil {
				t.Fatal(err)
			}
			if carries := bytes.Contains(b, []byte("hub.example.com")); carries != (version == 2) {
				t.Errorf("version %d: carries the server name: %v", version, carries)
			}
			got, n, err := ParseProxy(append(bytes.Clone(b), "more"...))
			if err != nil || got != p || n != len(b) {
				t.Errorf("version %d: %+v, %d of %d, %v", version, got, n, len(b), err)
			}
			for i := range len(b) {
				if _, _, err := ParseProxy(b[:i]); !errors.Is(err, ErrShort) {
					t.Fatalf("%q: %v, want ErrShort", b[:i], err)
				}
			}
		}
	}
	mixed, err := AppendProxy(nil, 1, Proxied{v4.Source, v6.Destination}, "")
	if err != nil || string(mixed) != "PROXY UNKNOWN\r\n" {
		t.Errorf("%q, %v", mixed, err)
	}
}

func TestProxyRefused(t *testing.T) {
	v2 := string(proxyproto.SIGV2)
	for name, c := range map[string]struct {
		text string
		want Reason
	}{
		"TLS":               {"\x16\x03\x01", Malformed},
		"CONNECT":           {"CONNECT hub.example.com:443 HTTP/1.1\r\n", Malformed},
		"another word":      {"PROXIED TCP4 ", Malformed},
		"no addresses":      {"PROXY TCP4\r\n", Malformed},
		"wrong family":      {"PROXY TCP4 ::1 ::2 1 2\r\n", Malformed},
		"UDP":               {"PROXY UDP4 10.0.0.1 10.0.0.2 1 2\r\n", Malformed},
		"port":              {"PROXY TCP4 10.0.0.1 10.0.0.2 65536 2\r\n", Malformed},
		"unspecified":       {"PROXY TCP4 0.0.0.0 10.0.0.2 1 2\r\n", Malformed},
		"multicast":         {"PROXY TCP4 224.0.0.1 10.0.0.2 1 2\r\n", Malformed},
		"too long":          {"PROXY TCP4 " + strings.Repeat(" ", 107), Oversized},
		"version 3":         {v2 + "\x31\x11\x00\x0c" + strings.Repeat("a", 12), Malformed},
		"version 2, UDP":    {v2 + "\x21\x12\x00\x0c" + strings.Repeat("a", 12), Malformed},
		"version 2, Unix":   {v2 + "\x21\x31\x00\xd8" + strings.Repeat("a", 216), Malformed},
		"version 2, short":  {v2 + "\x21\x11\x00\x04" + strings.Repeat("a", 12), Malformed},
		"version 2, long":   {v2 + "\x21\x11\xff\xff", Oversized},
		"version 2, unspec": {v2 + "\x21\x00\x00\x00", Malformed},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := ParseProxy([]byte(c.text))
			var refused *Error
			if !errors.As(err, &refused) || refused.Reason != c.want {
				t.Errorf("%v, want %s", err, c.want)
			}
		})
	}
}

func FuzzProxy(f *testing.F) {
	p := Proxied{netip.MustParseAddrPort("192.0.2.1:1000"), netip.MustParseAddrPort("198.51.100.1:443")}
	for version := 1; version <= 2; version++ {
		b, err := AppendProxy(nil, version, p, "hub.example.com")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append(b, "more"...))
	}
	f.Add([]byte("PROXY UNKNOWN\r\n"))
	f.Add([]byte("PROXY TCP6 ::1 ::2 1 2\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, n, err := ParseProxy(b)
		checkError(t, err)
		if err != nil {
			return
		}
		if n > len(b) || n > maxProxyV2 {
			t.Fatalf("takes %d bytes of %d", n, len(b))
		}
		if !got.Source.IsValid() {
			return
		}
		again, err := AppendProxy(nil, 2, got, "")
		if err != nil {
			t.Fatal(err)
		}
		if back, _, err := ParseProxy(again); err != nil || back != got && back != (Proxied{}) {
			t.Fatalf("%+v came back as %+v, %v", got, back, err)
		}
	})
}

func TestKindAndName(t *testing.T) {
	for b, want := range map[byte]Kind{0x16: TLS, 'C': HTTP, 'G': HTTP, 'P': HTTP, 'c': Neither, 0x80: Neither, '\r': Neither, 0: Neither} {
		if got := KindOf(b); got != want {
			t.Errorf("KindOf(%q) = %v, want %v", b, got, want)
		}
	}
	for in, want := range map[string]string{
		"hub": "hub", "H0-1.Front.Example.COM": "h0-1.front.example.com", "_srv.example.com": "_srv.example.com",
		"1.example.com": "1.example.com", "0xabc.example.com": "0xabc.example.com", "a.0xg": "a.0xg",
		"": "", "-a.example.com": "", "a-.example.com": "", "a..b": "", ".a": "", "a.": "", "a b": "", "a/b": "", "1.2.3.4": "", "a.0x": "", "a.5": "",
		strings.Repeat("a", 63) + ".b": strings.Repeat("a", 63) + ".b", strings.Repeat("a", 64) + ".b": "",
	} {
		got, err := Name(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("Name(%q) = %q, %v", in, got, err)
		}
	}
}

package preamble

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// clientHello is what a real client (crypto/tls) sends first, as one record.
func clientHello(t testing.TB, config *tls.Config) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer client.Close()
	defer server.Close()
	go func() { _ = tls.Client(client, config).HandshakeContext(context.Background()) }()
	_ = server.SetDeadline(time.Now().Add(5 * time.Second))
	head := make([]byte, 5)
	if _, err := io.ReadFull(server, head); err != nil {
		t.Fatal(err)
	}
	record := make([]byte, 5+int(binary.BigEndian.Uint16(head[3:])))
	copy(record, head)
	if _, err := io.ReadFull(server, record[5:]); err != nil {
		t.Fatal(err)
	}
	return record
}

func named(name string) *tls.Config {
	return &tls.Config{ServerName: name, MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}
}

// records cuts a handshake message anew, at the given places.
func records(message []byte, cuts ...int) []byte {
	var out []byte
	from := 0
	for _, to := range append(cuts, len(message)) {
		out = append(out, 22, 3, 1, byte((to-from)>>8), byte(to-from))
		out = append(out, message[from:to]...)
		from = to
	}
	return out
}

func TestHelloOfRealClients(t *testing.T) {
	kem := named("Hub-0.Example.com")
	kem.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768, tls.X25519}
	small := named("a.b")
	small.CurvePreferences = []tls.CurveID{tls.CurveP256}
	protocols := named("hub.example.com")
	protocols.NextProtos = []string{"h2", "http/1.1"}
	for name, c := range map[string]struct {
		config *tls.Config
		want   Hello
		least  int
	}{
		"ML-KEM": {kem, Hello{ServerName: "hub-0.example.com"}, 1400},
		"small":  {small, Hello{ServerName: "a.b"}, 0},
		"ALPN":   {protocols, Hello{ServerName: "hub.example.com"}, 0},
		"ECH":    {encrypted(t, "secret.example.com", "outer.example.com"), Hello{"outer.example.com", true}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := clientHello(t, c.config)
			if len(b) < c.least {
				t.Fatalf("%d bytes are no test of this", len(b))
			}
			if bytes.Contains(b, []byte("secret")) {
				t.Fatal("the inner name is in the clear")
			}
			got, err := ParseHello(b)
			if err != nil || got != c.want {
				t.Errorf("%+v, %v; want %+v", got, err, c.want)
			}
			for n := range len(b) {
				if _, err := ParseHello(b[:n]); !errors.Is(err, ErrShort) {
					t.Fatalf("%d of %d bytes: %v, want ErrShort", n, len(b), err)
				}
			}
		})
	}
}

// encrypted is a client that knows how to encrypt its hello to outer (RFC 9849).
func encrypted(t *testing.T, inner, outer string) *tls.Config {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public := key.PublicKey().Bytes()
	contents := []byte{7, 0, 0x20} // config id, DHKEM(X25519)
	contents = binary.BigEndian.AppendUint16(contents, uint16(len(public)))
	contents = append(contents, public...)
	contents = append(contents, 0, 4, 0, 1, 0, 1, 0) // HKDF-SHA256, AES-128-GCM; maximum name length
	contents = append(contents, byte(len(outer)))
	contents = append(contents, outer...)
	contents = append(contents, 0, 0)
	config := binary.BigEndian.AppendUint16([]byte{0xfe, 0x0d}, uint16(len(contents)))
	config = append(config, contents...)
	c := named(inner)
	c.MinVersion = tls.VersionTLS13
	c.EncryptedClientHelloConfigList = append(binary.BigEndian.AppendUint16(nil, uint16(len(config))), config...)
	return c
}

// However a hello is cut into records, its meaning stays.
func TestHelloInAnyRecords(t *testing.T) {
	message := clientHello(t, named("hub.example.com"))[5:]
	rapid.Check(t, func(t *rapid.T) {
		places := rapid.SliceOfNDistinct(rapid.IntRange(1, len(message)-1), 0, 40, rapid.ID).Draw(t, "cuts")
		cuts := make([]bool, len(message))
		for _, p := range places {
			cuts[p] = true
		}
		var sorted []int
		for i, cut := range cuts {
			if cut {
				sorted = append(sorted, i)
			}
		}
		b := records(message, sorted...)
		after := rapid.SliceOfN(rapid.Byte(), 0, 8).Draw(t, "after")
		got, err := ParseHello(append(bytes.Clone(b), after...))
		if err != nil || got.ServerName != "hub.example.com" {
			t.Fatalf("%+v, %v", got, err)
		}
		if n := rapid.IntRange(0, len(b)-1).Draw(t, "arrived"); true {
			if _, err := ParseHello(b[:n]); !errors.Is(err, ErrShort) {
				t.Fatalf("%d of %d: %v", n, len(b), err)
			}
		}
	})
	t.Run("a byte each", func(t *testing.T) {
		var cuts []int
		for i := 1; i < len(message); i++ {
			cuts = append(cuts, i)
		}
		if got, err := ParseHello(records(message, cuts...)); err != nil || got.ServerName != "hub.example.com" {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

// extension is a TLS extension.
func extension(kind uint16, data string) string {
	b := binary.BigEndian.AppendUint16(nil, kind)
	return string(binary.BigEndian.AppendUint16(b, uint16(len(data)))) + data
}

// sni is a server name extension with the given entries: a type and a name each.
func sni(entries ...string) string {
	list := ""
	for _, e := range entries {
		list += e[:1] + string(binary.BigEndian.AppendUint16(nil, uint16(len(e)-1))) + e[1:]
	}
	return extension(0, string(binary.BigEndian.AppendUint16(nil, uint16(len(list))))+list)
}

// hello is a handshake message with the extensions.
func hello(extensions string) []byte {
	body := "\x03\x03" + strings.Repeat("r", 32) + "\x00" + "\x00\x02\x13\x01" + "\x01\x00"
	body += string(binary.BigEndian.AppendUint16(nil, uint16(len(extensions)))) + extensions
	b := binary.BigEndian.AppendUint32(nil, uint32(len(body))|1<<24)
	return append(b, body...)
}

func TestHelloRefused(t *testing.T) {
	good := hello(sni("\x00hub.example.com"))
	with := func(at int, value byte) []byte {
		b := bytes.Clone(good)
		b[at] = value
		return records(b)
	}
	var many string
	for i := range maxExtensions + 1 {
		many += extension(uint16(1000+i), "")
	}
	for name, c := range map[string]struct {
		b    []byte
		want Reason
	}{
		"no server name":        {records(hello(extension(10, ""))), NoServerName},
		"no extensions":         {records(hello("")), NoServerName},
		"two extensions":        {records(hello(sni("\x00a.example.com") + sni("\x00b.example.com"))), Malformed},
		"two names":             {records(hello(sni("\x00a.example.com", "\x00b.example.com"))), Malformed},
		"another type":          {records(hello(sni("\x01a.example.com"))), Malformed},
		"another type beside":   {records(hello(sni("\x00a.example.com", "\x01b.example.com"))), Malformed},
		"empty list":            {records(hello(sni())), Malformed},
		"empty extension":       {records(hello(extension(0, ""))), Malformed},
		"empty name":            {records(hello(sni("\x00"))), Malformed},
		"address":               {records(hello(sni("\x00127.0.0.1"))), NotAName},
		"short address":         {records(hello(sni("\x00127.1"))), NotAName},
		"hexadecimal address":   {records(hello(sni("\x000x7f.0x1"))), NotAName},
		"IPv6 address":          {records(hello(sni("\x00[::1]"))), NotAName},
		"dot at the end":        {records(hello(sni("\x00hub.example.com."))), NotAName},
		"newline":               {records(hello(sni("\x00hub\n.example.com"))), NotAName},
		"NUL":                   {records(hello(sni("\x00hub.example.com\x00.evil.org"))), NotAName},
		"not ASCII":             {records(hello(sni("\x00hüb.example.com"))), NotAName},
		"too long":              {records(hello(sni("\x00" + strings.Repeat("a.", 127) + "aa"))), NotAName},
		"other extension twice": {records(hello(sni("\x00a.b") + extension(10, "") + extension(10, ""))), Malformed},
		"too many extensions":   {records(hello(many)), Oversized},
		"junk after extensions": {records(append(good[:3:3], append([]byte{good[3] + 1}, append(good[4:len(good):len(good)], 0)...)...)), Malformed},
		"a server's hello":      {with(0, 2), Malformed},
		"oversized":             {with(1, 1), Oversized},
		"session too long":      {with(38, 33), Malformed},
		"an alert":              {[]byte{21, 3, 1, 0, 2, 1, 0}, Malformed},
		"application data":      {append(records(good[:10]), 23, 3, 3, 0, 1, 0), Malformed},
		"SSL 2":                 {[]byte{22, 2, 0, 0, 1, 1}, Malformed},
		"empty record":          {append([]byte{22, 3, 1, 0, 0}, records(good)...), Malformed},
		"record too long":       {[]byte{22, 3, 1, 0x40, 1, 1}, Malformed},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseHello(c.b)
			var refused *Error
			if !errors.As(err, &refused) || refused.Reason != c.want {
				t.Errorf("%v, want %s", err, c.want)
			}
		})
	}
	if got, err := ParseHello(records(good)); err != nil || got.ServerName != "hub.example.com" {
		t.Errorf("the good one: %+v, %v", got, err)
	}
	// Exactly as large as may be, and refused as soon as the size is known.
	large := hello(sni("\x00hub.example.com") + extension(21, strings.Repeat("\x00", MaxSize-len(good)-4)))
	if _, err := ParseHello(records(large, 1<<14-100)); err != nil {
		t.Errorf("%d bytes: %v", len(large), err)
	}
	var refused *Error
	if _, err := ParseHello([]byte{22, 3, 1, 1, 0, 1, 0, 0x40, 0}); !errors.As(err, &refused) || refused.Reason != Oversized {
		t.Errorf("%v", err)
	}
}

func FuzzHello(f *testing.F) {
	f.Add(clientHello(f, named("hub.example.com")))
	small := named("Hub.Example.Com")
	small.CurvePreferences = []tls.CurveID{tls.X25519}
	f.Add(clientHello(f, small))
	message := clientHello(f, small)[5:]
	f.Add(records(message, 1, 4, 50))
	f.Add(records(hello(sni("\x00a.example.com", "\x00b.example.com"))))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := ParseHello(b)
		checkError(t, err)
		if err != nil {
			return
		}
		// What a real server makes of it is the same name, or nothing.
		if name, ok := asServer(b); ok && !strings.EqualFold(name, got.ServerName) {
			t.Fatalf("read %q, a server reads %q", got.ServerName, name)
		}
		// Until all of it is there, more is asked for.
		for n := range b {
			early, err := ParseHello(b[:n])
			if err == nil && early != got || err != nil && !errors.Is(err, ErrShort) {
				t.Fatalf("%d of %d bytes: %+v, %v", n, len(b), early, err)
			}
		}
	})
}

// checkError holds errors to what the parsers promise.
func checkError(t *testing.T, err error) {
	t.Helper()
	if err == nil || errors.Is(err, ErrShort) {
		return
	}
	var refused *Error
	if !errors.As(err, &refused) || refused.Reason == "" || strings.ContainsAny(err.Error(), "\r\n\x00") {
		t.Fatalf("not an error of this package, or not one line: %q", err)
	}
}

// asServer is the server name that crypto/tls reads.
func asServer(b []byte) (name string, ok bool) {
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(info *tls.ClientHelloInfo) (*tls.Config, error) {
			name, ok = info.ServerName, true
			return nil, errors.New("that is all")
		},
	}
	_ = tls.Server(&fixed{r: bytes.NewReader(b)}, config).HandshakeContext(context.Background())
	return name, ok
}

// fixed is a connection from which some bytes come, and then its end.
type fixed struct {
	net.Conn
	r io.Reader
}

func (f *fixed) Read(b []byte) (int, error)       { return f.r.Read(b) }
func (f *fixed) Write(b []byte) (int, error)      { return len(b), nil }
func (f *fixed) Close() error                     { return nil }
func (f *fixed) SetDeadline(time.Time) error      { return nil }
func (f *fixed) SetWriteDeadline(time.Time) error { return nil }

package wire

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestFrame(t *testing.T) {
	for _, f := range []Frame{
		{FrameOpen, 0, 1}, {FrameOpen, MaxControl, 1}, {FrameAnswer, 5, 7}, {FrameData, 1, 1<<32 - 1}, {FrameData, MaxData, 2},
		{FrameFin, 0, 3}, {FrameReset, 0, 3}, {FrameCredit, 4, 3}, {FramePing, 8, 0}, {FramePong, 8, 0}, {FrameGoAway, 0, 0},
	} {
		got, err := ParseFrame([FrameHeader]byte(f.Append(nil)))
		if err != nil || got != f {
			t.Errorf("%v: %v, %v", f, got, err)
		}
	}
	for _, f := range []Frame{
		{0, 0, 1}, {FrameGoAway + 1, 0, 1}, {FrameOpen, MaxControl + 1, 1}, {FrameData, 0, 1}, {FrameData, MaxData + 1, 1}, {FrameFin, 1, 1},
		{FrameCredit, 3, 1}, {FramePing, 7, 0}, {FramePing, 8, 1}, {FrameOpen, 0, 0}, {FrameGoAway, 0, 1},
	} {
		if got, err := ParseFrame([FrameHeader]byte(f.Append(nil))); !errors.Is(err, ErrFrame) {
			t.Errorf("%v: accepted as %v", f, got)
		}
	}
}

func TestMessages(t *testing.T) {
	for _, o := range []Open{{StreamTarget, 10 * time.Second, "10.0.0.1:443"}, {StreamExport, 0, "api"}, {StreamHello, 0, ""}} {
		if got, err := ParseOpen(o.Append(nil)); err != nil || got != o {
			t.Errorf("%v: %v, %v", o, got, err)
		}
	}
	for _, o := range []Open{{StreamTarget, 0, ""}, {StreamHello, 0, "x"}, {'X', 0, "x"}, {StreamTarget, 0, strings.Repeat("x", MaxTarget+1)}} {
		if got, err := ParseOpen(o.Append(nil)); !errors.Is(err, ErrMessage) {
			t.Errorf("%v: accepted as %v", o, got)
		}
	}
	if got, err := ParseOpened(append(Opened{Dial: 1500 * time.Microsecond}.Append(nil), "later"...)); err != nil || got.Dial != 1500*time.Microsecond {
		t.Errorf("%v, %v", got, err)
	}
	r := Refuse(ReasonDenied, "no\r\nSet-Cookie: x %s", "ü")
	if got := ParseRefusal(r.Append(nil)); *got != *r || strings.ContainsAny(got.Message, "\r\nü") {
		t.Errorf("%+v", got)
	}
	if got := ParseRefusal([]byte("a surprise")); got.Reason != ReasonOther || got.Message != "a surprise" {
		t.Errorf("%+v", got)
	}
	if got := ParseRefusal(nil); got.Reason != ReasonCancelled {
		t.Errorf("%+v", got)
	}
	for reason := range reasons {
		if s := reason.Status(); s < 400 || s > 504 {
			t.Errorf("%s: status %d", reason, s)
		}
	}
	var b bytes.Buffer
	if err := WriteJSON(&b, Hello{Name: "x"}); err != nil {
		t.Fatal(err)
	}
	var h Hello
	if err := ReadJSON(&b, &h); err != nil || h.Name != "x" {
		t.Errorf("%v, %v", h, err)
	}
	if err := ReadJSON(strings.NewReader("\xff\xff\xff\xff"), &h); !errors.Is(err, ErrMessage) {
		t.Errorf("%v", err)
	}
}

func TestConnect(t *testing.T) {
	ok := map[string]string{
		"CONNECT 10.0.0.1:443 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n":                                      "10.0.0.1:443", // as kube-apiserver has it
		"CONNECT 10.0.0.1:443 HTTP/1.1\r\n\r\n":                                                         "10.0.0.1:443",
		"CONNECT [2001:db8::1]:1 HTTP/1.0\r\nHost: x\r\nUser-Agent: Go\r\nContent-Length: 0\r\n\r\n":    "[2001:db8::1]:1",
		"CONNECT x HTTP/1.1\r\nProxy-Authorization: Basic eA==\r\nProxy-Connection: Keep-Alive\r\n\r\n": "x",
	}
	for head, want := range ok {
		if got, refusal := ParseConnect([]byte(head)); refusal != nil || got != want {
			t.Errorf("%q: %q, %v", head, got, refusal)
		}
	}
	refused := map[string]int{
		"":                                                   400,
		"CONNECT a:1 HTTP/1.1\r\n":                           400,
		"CONNECT a:1\r\n\r\n":                                400,
		"CONNECT a:1 HTTP/2\r\n\r\n":                         400,
		"CONNECT  a:1 HTTP/1.1\r\n\r\n":                      400,
		"CONNECT a:1 HTTP/1.1 \r\n\r\n":                      400,
		"CONNECT a:1 b HTTP/1.1\r\n\r\n":                     400,
		"GET http://a/ HTTP/1.1\r\n\r\n":                     405,
		"connect a:1 HTTP/1.1\r\n\r\n":                       405,
		"CONNECT a:1 HTTP/1.1\r\nX\r\n\r\n":                  400,
		"CONNECT a:1 HTTP/1.1\r\n: x\r\n\r\n":                400,
		"CONNECT a:1 HTTP/1.1\r\nX : y\r\n\r\n":              400,
		"CONNECT a:1 HTTP/1.1\r\nX: y\r\n folded\r\n\r\n":    400,
		"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n": 400,
		"CONNECT a:1 HTTP/1.1\r\nhost: a\r\nHOST: a\r\n\r\n": 400,
		"CONNECT a:1 HTTP/1.1\r\nContent-Length: 5\r\n\r\n":  400,
		"CONNECT a:1 HTTP/1.1\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n": 400,
		"CONNECT a:1 HTTP/1.1\nHost: a\n\n\r\n\r\n":                                       400,
		"CONNECT a:1 HTTP/1.1\r\nX: a\rb\r\n\r\n":                                         400,
		"CONNECT a:1 HTTP/1.1\r\nX: a\x00b\r\n\r\n":                                       400,
		"CONNECT a:1 HTTP/1.1\r\nX: a\x01b\r\n\r\n":                                       400,
		"CONNECT " + strings.Repeat("a", MaxTarget+1) + " HTTP/1.1\r\n\r\n":               400,
		"CONNECT a:1 HTTP/1.1\r\n" + strings.Repeat("X: y\r\n", maxHeaders+1) + "\r\n":    431,
		"CONNECT a:1 HTTP/1.1\r\nX: " + strings.Repeat("y", MaxHead) + "\r\n\r\n":         400,
	}
	for head, want := range refused {
		got, refusal := ParseConnect([]byte(head))
		if refusal == nil || refusal.Reason.Status() != want {
			t.Errorf("%.80q: %q, %v; want %d", head, got, refusal, want)
		}
	}
}

func TestHubServerName(t *testing.T) {
	name := HubServerName("3F2A-91c4", 2, "front.example.com")
	if name != "h2-3f2a-91c4.front.example.com" {
		t.Error(name)
	}
	uid, i, ok := ParseHubServerName("H2-3f2a-91c4.Front.example.com.", "front.example.com")
	if !ok || uid != "3f2a-91c4" || i != 2 {
		t.Error(uid, i, ok)
	}
	for _, bad := range []string{"", "h-x.d", "h01-x.d", "h1-.d", "g1-x.d", "h1-x", "h1-x.y.d", "h-1-x.d", "h+1-x.d", "x.h1-x.d"} {
		if uid, i, ok := ParseHubServerName(bad, "d"); ok {
			t.Errorf("%q: %q, %d", bad, uid, i)
		}
	}
}

func FuzzFrame(f *testing.F) {
	f.Add(Frame{FrameData, 5, 1}.Append(nil))
	f.Add(Frame{FramePing, 8, 0}.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < FrameHeader {
			return
		}
		frame, err := ParseFrame([FrameHeader]byte(b))
		if err == nil && !bytes.Equal(frame.Append(nil), b[:FrameHeader]) {
			t.Errorf("%v is not what was read", frame)
		}
		if err == nil && (frame.Length > MaxData || frame.Length > MaxControl && frame.Type != FrameData) {
			t.Errorf("%v is too long", frame)
		}
	})
}

func FuzzMessages(f *testing.F) {
	f.Add(Open{StreamTarget, time.Second, "a:1"}.Append(nil))
	f.Add(Refuse(ReasonDenied, "no").Append(nil))
	f.Add(append([]byte{0, 0, 0, 2}, "{}"...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if o, err := ParseOpen(b); err == nil && !bytes.Equal(o.Append(nil), b) {
			t.Errorf("%v is not what was read", o)
		}
		if r := ParseRefusal(b); strings.ContainsAny(r.Message, "\r\n") || len(r.Message) > maxLine || !reasons[r.Reason] {
			t.Errorf("%+v", r)
		}
		_, _ = ParseOpened(b)
		for _, v := range []any{&Hello{}, &Welcome{}, &JoinRequest{}, &JoinReply{}} {
			_ = ReadJSON(bytes.NewReader(b), v)
		}
	})
}

// FuzzConnect: what is accepted reads the same when it is written again in the plainest
// way, and its target stands in the first line.
func FuzzConnect(f *testing.F) {
	f.Add([]byte("CONNECT 10.0.0.1:443 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"))
	f.Add([]byte("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"))
	f.Add([]byte("GET http://a/ HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		target, refusal := ParseConnect(b)
		if refusal != nil {
			if s := refusal.Reason.Status(); s < 400 || s > 499 || strings.ContainsAny(refusal.Message, "\r\n") {
				t.Errorf("%+v", refusal)
			}
			return
		}
		if HeadEnd(b) != len(b) || !IsConnect(b) {
			t.Error("accepted more than one head")
		}
		if strings.ContainsAny(target, " \r\n") {
			t.Errorf("target %q", target)
		}
		again, refusal := ParseConnect(fmt.Appendf(nil, "CONNECT %s HTTP/1.1\r\n\r\n", target))
		if refusal != nil || again != target {
			t.Errorf("%q, %v", again, refusal)
		}
	})
}

package model

import (
	"fmt"
	"testing"
	"time"
)

// 10,000 devices are decoded and parsed well within the time in which they must work.
func TestTenThousandDevicesAreQuick(t *testing.T) {
	const n = 10000
	docs := make([][]byte, n)
	for i := range docs {
		docs[i] = fmt.Appendf(nil, `apiVersion: culvert.dev/v1alpha1
kind: Device
metadata:
  name: device-%05d
  namespace: default
spec:
  gatewayRef:
    name: gw
  publicKey: %s
  access:
    to: [Pods, Services]
`, i, testKey(i))
	}
	start := time.Now()
	var objects Objects
	add := func(doc []byte) {
		decoded, problems := Decode(doc, "devices.yaml:1")
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		for _, d := range decoded {
			objects.Add(d)
		}
	}
	add([]byte("apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: gw}\nspec: {deviceCIDRs: [10.99.0.0/16]}\n"))
	for _, d := range docs {
		add(d)
	}
	decode := time.Since(start)
	start = time.Now()
	m := Parse(objects, ParseOptions{})
	parse := time.Since(start)
	if len(m.Problems) > 0 {
		t.Fatal(m.Problems[0])
	}
	if got := len(m.Gateways[0].Devices); got != n {
		t.Fatalf("%d devices, want %d", got, n)
	}
	t.Logf("%d devices: decode %s, parse %s", n, decode.Round(time.Millisecond), parse.Round(time.Millisecond))
	if decode+parse > 1500*time.Millisecond {
		t.Errorf("decode and parse took %s, want at most 1.5s", decode+parse)
	}
}

// testKey is a different WireGuard key for every number.
func testKey(i int) string {
	return fmt.Sprintf("%07dabcdefghijklmnopqrstuvwxyzABCDEFGHII=", i)
}

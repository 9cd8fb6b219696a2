package nft

import (
	"bytes"
	"fmt"
	"math/bits"
	"net/netip"
	"strings"

	"github.com/google/nftables"
)

// rangeTexts turns the elements of a concatenation with ranges into the text that they
// are written as.
func rangeTexts(d setDecl, list []nftables.SetElement) (map[string]string, error) {
	out := make(map[string]string, len(list))
	for _, e := range list {
		first, last := e.Key, e.KeyEnd
		if len(last) == 0 {
			last = first
		}
		var fields []string
		for _, kind := range strings.Split(d.types, " . ") {
			size := fieldSizes[kind]
			if size == 0 || len(first) < size || len(last) < size {
				return nil, fmt.Errorf("element of %d bytes, want %s", len(e.Key), d.types)
			}
			f, err := fieldText(kind, first[:size], last[:size])
			if err != nil {
				return nil, err
			}
			fields = append(fields, f)
			first, last = first[size:], last[size:]
		}
		value := ""
		if d.value != "" {
			value = "goto " + verdictChain(e)
		}
		out[strings.Join(fields, " . ")] = value
	}
	return out, nil
}

// fieldSizes are the sizes of fields in a concatenation: multiples of four bytes.
var fieldSizes = map[string]int{"ifname": 16, "ipv4_addr": 4, "ipv6_addr": 16, "nf_proto": 4}

// fieldText is one field of an element, from its first to its last value.
func fieldText(kind string, first, last []byte) (string, error) {
	switch kind {
	case "ifname":
		name, _, _ := bytes.Cut(first, []byte{0})
		return `"` + string(name) + `"`, nil
	case "nf_proto":
		for _, f := range families {
			if f.number == first[0] {
				return f.nfproto, nil
			}
		}
		return "", fmt.Errorf("protocol family %d", first[0])
	}
	a, _ := netip.AddrFromSlice(first)
	return prefixText(netip.PrefixFrom(a, commonBits(first, last))), nil
}

// commonBits is how many leading bits two slices of one length have in common.
func commonBits(a, b []byte) int {
	for i := range a {
		if x := a[i] ^ b[i]; x != 0 {
			return i*8 + bits.LeadingZeros8(x)
		}
	}
	return len(a) * 8
}

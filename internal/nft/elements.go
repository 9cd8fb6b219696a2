package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// elementTexts turns the elements of one of the ports' sets into the text that they are
// written as. Fields of a concatenation are padded to four bytes each.
func elementTexts(set string, list []nftables.SetElement) (map[string]string, error) {
	out := make(map[string]string, len(list))
	for _, e := range list {
		var key, value string
		var err error
		switch {
		case strings.HasPrefix(set, "svc_eps"):
			key = markText(e.Key)
			value, err = fieldsText(e.Val, set, "port")
		case strings.HasPrefix(set, "svc_slots"):
			key, err = fieldsText(e.Key, set, "proto", "port", "mark")
			value = markText(e.Val)
		case strings.HasPrefix(set, "svc_picks"):
			key, err = fieldsText(e.Key, set, "proto", "port")
			value = "goto " + verdictChain(e)
		default: // affinities: only the number matters
			key, value = fmt.Sprintf("%x", e.Key), markText(e.Val)
		}
		if err != nil {
			return nil, err
		}
		out[key] = value
	}
	return out, nil
}

// verdictChain is where the verdict of an element leads; the library leaves it undecoded
// (attributes of enum nft_verdict_attributes).
func verdictChain(e nftables.SetElement) string {
	ad, err := netlink.NewAttributeDecoder(e.Val)
	if err != nil {
		return ""
	}
	for ad.Next() {
		if ad.Type() == unix.NFTA_VERDICT_CHAIN {
			return ad.String()
		}
	}
	return ""
}

// markText is a number as nft(8) writes it; "" for what is none.
func markText(b []byte) string {
	if len(b) < 4 {
		return ""
	}
	return strconv.FormatUint(uint64(binary.NativeEndian.Uint32(b)), 10)
}

// fieldsText is an address, of the family that the set's name ends in, and more fields.
func fieldsText(b []byte, set string, fields ...string) (string, error) {
	size := 4
	if strings.HasSuffix(set, "6") {
		size = 16
	}
	if len(b) != size+4*len(fields) {
		return "", fmt.Errorf("element of %d bytes, want %d", len(b), size+4*len(fields))
	}
	a, _ := netip.AddrFromSlice(b[:size])
	out := a.String()
	for _, f := range fields {
		b = b[size:]
		size = 4
		switch f {
		case "proto":
			out += " . " + strconv.Itoa(int(b[0]))
		case "mark":
			out += " . " + markText(b)
		default:
			out += " . " + strconv.Itoa(int(binary.BigEndian.Uint16(b)))
		}
	}
	return out, nil
}

// portsOf finds the translated ports in the maps of the table.
func portsOf(sets map[string]map[string]string) (*ports, error) {
	out := newPorts()
	for name, elements := range sets {
		if !strings.HasPrefix(name, "svc_aff") {
			continue
		}
		for _, v := range elements {
			x, err := strconv.ParseUint(v, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("affinity in %s: %w", name, err)
			}
			out.next = max(out.next, uint32(x)+1)
		}
	}
	for _, f := range families {
		number := map[string]endpoint{}
		for k, v := range sets["svc_eps"+f.n] {
			e, err := parseEndpoint(k, v)
			if err != nil {
				return nil, err
			}
			number[k] = e
			out.next = max(out.next, e.number+1)
		}
		slots := sets["svc_slots"+f.n]
		for key, verdict := range sets["svc_picks"+f.n] {
			k, p, err := parsePort(key, verdict)
			if err != nil {
				return nil, err
			}
			for i := 0; ; i++ {
				slot, ok := slots[fmt.Sprintf("%s . %d", key, i)]
				if !ok {
					break
				}
				e, ok := number[slot]
				if !ok {
					return nil, fmt.Errorf("service port %s has no endpoint in slot %d", key, i)
				}
				p.eps = append(p.eps, e)
			}
			if !strings.HasSuffix(verdict, " svc_"+p.pick(k).name()) {
				return nil, fmt.Errorf("service port %s with %d endpoints leads to %q", key, len(p.eps), verdict)
			}
			out.byKey[k] = p
		}
	}
	return out, nil
}

func parseEndpoint(number, value string) (endpoint, error) {
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return endpoint{}, fmt.Errorf("endpoint number: %w", err)
	}
	addr, portText, _ := strings.Cut(value, " . ")
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return endpoint{}, fmt.Errorf("endpoint %d: %w", n, err)
	}
	p, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return endpoint{}, fmt.Errorf("endpoint %d: %w", n, err)
	}
	return endpoint{netip.AddrPortFrom(a, uint16(p)), uint32(n)}, nil
}

// parsePort reads an element of svc_picks; the endpoints are still to be filled in.
func parsePort(key, verdict string) (portKey, *port, error) {
	var k portKey
	f := strings.Split(key, " . ")
	if len(f) != 3 {
		return k, nil, fmt.Errorf("service port %q: want address, protocol and port", key)
	}
	a, err := netip.ParseAddr(f[0])
	if err != nil {
		return k, nil, fmt.Errorf("service port %q: %w", key, err)
	}
	proto, err := strconv.ParseUint(f[1], 10, 8)
	if err != nil {
		return k, nil, fmt.Errorf("service port %q: %w", key, err)
	}
	number, err := strconv.ParseUint(f[2], 10, 16)
	if err != nil {
		return k, nil, fmt.Errorf("service port %q: %w", key, err)
	}
	k = portKey{a, netstate.Protocol(proto), uint16(number)}
	p := &port{}
	if name, ok := strings.CutPrefix(verdict, "goto svc_sticky"); ok {
		var family int
		if _, err := fmt.Sscanf(name, "%d_%ds_", &family, &p.affinity); err != nil {
			return k, nil, fmt.Errorf("service port %q leads to %q", key, verdict)
		}
	}
	return k, p, nil
}

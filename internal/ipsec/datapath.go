package ipsec

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// DetectDatapath tries out, in the caller's network namespace, whether the kernel has ESP
// (CONFIG_INET_ESP) and xfrm interfaces (CONFIG_XFRM_INTERFACE, Linux 4.19), by adding
// and removing one of each. Without them ESP is done by the daemon (LibIPsec), and reason
// says what is missing. The error is for what hinders the attempt itself (no
// CAP_NET_ADMIN). Two processes may try at the same time: what the other one has just
// added is there.
func DetectDatapath() (datapath netstate.IPsecDatapath, reason string, err error) {
	if err := tryESP(); err != nil {
		if errors.Is(err, os.ErrPermission) {
			return "", "", fmt.Errorf("find out whether the kernel has ESP: %w", err)
		}
		return netstate.LibIPsec, fmt.Sprintf("the kernel has no ESP: %v", err), nil
	}
	if err := tryLink(); err != nil {
		if errors.Is(err, os.ErrPermission) {
			return "", "", fmt.Errorf("find out whether the kernel has xfrm interfaces: %w", err)
		}
		return netstate.LibIPsec, fmt.Sprintf("the kernel has no xfrm interfaces: %v", err), nil
	}
	return netstate.KernelESP, "the kernel has ESP and xfrm interfaces", nil
}

func tryESP() error {
	state := &netlink.XfrmState{
		Src: net.IPv4(127, 0, 0, 1), Dst: net.IPv4(127, 196, 0, 1),
		Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TUNNEL, Spi: 0x43565400,
		Aead: &netlink.XfrmStateAlgo{Name: "rfc4106(gcm(aes))", Key: make([]byte, 36), ICVLen: 128},
	}
	if err := netlink.XfrmStateAdd(state); err != nil {
		return ignoreExisting(err)
	}
	return ignoreGone(netlink.XfrmStateDel(state))
}

func tryLink() error {
	link := &netlink.Xfrmi{LinkAttrs: netlink.LinkAttrs{Name: "cvtprobe"}, Ifid: 0x43565400}
	if err := netlink.LinkAdd(link); err != nil {
		return ignoreExisting(err)
	}
	return ignoreGone(netlink.LinkDel(link))
}

func ignoreExisting(err error) error {
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func ignoreGone(err error) error {
	var notFound netlink.LinkNotFoundError
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENODEV) || errors.As(err, &notFound) {
		return nil
	}
	return err
}

package wireguard

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const wireGuardKind = "wireguard"

// links is rtnetlink in one namespace.
type links struct{ h *netlink.Handle }

func newLinks(ns *namespace) (*links, error) {
	l := &links{}
	err := ns.do(func() (err error) { l.h, err = netlink.NewHandle(unix.NETLINK_ROUTE); return err })
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	return l, nil
}

func (l *links) close() { l.h.Close() }

func (l *links) byName(name string) (netlink.Link, error) { return l.h.LinkByName(name) }

// kernelLinks lists the links of ours that are kernel WireGuard devices.
func (l *links) kernelLinks() ([]string, error) {
	all, err := l.h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var names []string
	for _, k := range all {
		if k.Type() == wireGuardKind && strings.HasPrefix(k.Attrs().Name, linkPrefix) {
			names = append(names, k.Attrs().Name)
		}
	}
	return names, nil
}

// add makes a kernel WireGuard link.
func (l *links) add(name string) error {
	return l.h.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: name}})
}

// remove deletes a link; one that is not there is no error.
func (l *links) remove(name string) error {
	k, err := l.h.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	return l.h.LinkDel(k)
}

// Remove deletes a link that a process has left which cannot do so itself any more; one that
// is not there is no error.
func Remove(link string) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open rtnetlink: %w", err)
	}
	l := &links{h}
	defer l.close()
	if err := l.remove(link); err != nil {
		return fmt.Errorf("remove link %s: %w", link, err)
	}
	return nil
}

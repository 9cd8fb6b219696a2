package ipsec

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink"
)

// flushXFRM removes the kernel's SAs and policies of the given interface IDs: those that
// a daemon which was killed has left.
func flushXFRM(h *netlink.Handle, interfaceIDs map[uint32]bool) error {
	if len(interfaceIDs) == 0 {
		return nil
	}
	states, err := h.XfrmStateList(netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list the kernel's SAs: %w", err)
	}
	var errs []error
	for _, s := range states {
		if interfaceIDs[uint32(s.Ifid)] {
			errs = append(errs, ignore(h.XfrmStateDel(&s), syscall.ESRCH))
		}
	}
	policies, err := h.XfrmPolicyList(netlink.FAMILY_ALL)
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("list the kernel's policies: %w", err))...)
	}
	for _, p := range policies {
		if interfaceIDs[uint32(p.Ifid)] {
			errs = append(errs, ignore(h.XfrmPolicyDel(&p), syscall.ENOENT))
		}
	}
	return errors.Join(errs...)
}

package gateway

import (
	"errors"

	"golang.org/x/sys/unix"
)

// errPrivilege is the first thing that a newcomer meets.
var errPrivilege = errors.New("a gateway configures the network: run it as root, or with the capability NET_ADMIN as uid 0")

// mayConfigureNetwork checks for an effective CAP_NET_ADMIN (capabilities(7)).
func mayConfigureNetwork() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil || data[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		return errPrivilege
	}
	return nil
}

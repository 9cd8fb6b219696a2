//go:build !linux

package connect

import "net"

func awaitRead(net.Conn) {}

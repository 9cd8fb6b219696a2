package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/wireguard"
)

// device are the steps that make the WireGuard device, or take it away.
func (e *encryption) device(s netstate.State) []step {
	return []step{
		{"sysctls", func(ctx context.Context) (int, error) { return e.route.SetSysctls(ctx, s.Sysctls) }},
		{"routes of others", e.moveForeign},
		{"wireguard", func(ctx context.Context) (int, error) { return e.setDevice(ctx, s.WireGuard) }},
	}
}

func (e *encryption) setDevice(ctx context.Context, want []netstate.WireGuard) (int, error) {
	if e.wg == nil {
		if len(want) == 0 && !exists(netstate.EncryptionLink) {
			return 0, nil
		}
		var err error
		if e.wg, err = wireguard.New(wireguard.Options{Logger: e.log}); err != nil {
			return 0, err
		}
	}
	return e.wg.Set(ctx, want)
}

// moveForeign keeps the routes of others from depending on a device that may go at any time: with
// the NodeEncryption, and where it is in user space, with this process. It changes nothing about
// what is encrypted: our rules come before the main table.
func (e *encryption) moveForeign(ctx context.Context) (int, error) {
	n, err := e.route.MoveForeign(ctx, netstate.EncryptionLink)
	if n == 0 {
		return 0, err
	}
	level := slog.LevelDebug // a network plugin may do it again every minute
	if !e.moved {
		level, e.moved = slog.LevelInfo, true
	}
	e.log.Log(ctx, level, "moved routes that others had put onto the encrypted link: the network plugin takes it for the way to the other nodes",
		"link", netstate.EncryptionLink, "routes", n)
	return 0, err
}

func exists(link string) bool {
	_, err := net.InterfaceByName(link)
	return err == nil
}

// remove takes the device down; the guard goes later.
func (e *encryption) remove() error {
	_, err := e.moveForeign(context.Background())
	if e.wg == nil {
		_, setErr := e.setDevice(context.Background(), nil)
		err = errors.Join(err, setErr)
	}
	if e.wg != nil {
		err = errors.Join(err, e.wg.Close())
	}
	return err
}

package netlab

import (
	"fmt"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/strongswan"
)

// ikeDaemon is an unmodified strongSwan on a host.
type ikeDaemon struct {
	*strongswan.Daemon
	host *labtest.Host
}

func newStrongSwan(t *testing.T, h *labtest.Host, conf string) *ikeDaemon {
	t.Helper()
	return &ikeDaemon{strongswan.New(t, h.Host, conf), h}
}

// children has a child SA for each family, as the gateway has.
func children(cidrs string) string {
	four, six, _ := strings.Cut(cidrs, ",")
	child := func(name, local, remote string) string {
		return fmt.Sprintf(`      %s {
        local_ts = %s
        remote_ts = %s
        esp_proposals = aes256gcm16-x25519
        start_action = start
        close_action = start
        dpd_action = restart
      }
`, name, local, remote)
	}
	text := child("net4", four, "10.244.0.0/16,10.96.0.0/16")
	if six != "" {
		text += child("net6", six, "fd00:10:244::/48,fd00:10:96::/112")
	}
	return text
}

// pskConf is the swanctl.conf of a site NAME.example.com that dials the gateway at once;
// edits are pairs of old and new text.
func pskConf(name, cidrs, psk string, edits ...string) string {
	return strings.NewReplacer(edits...).Replace(fmt.Sprintf(`connections {
  culvert {
    version = 2
    remote_addrs = %s
    proposals = aes256gcm16-prfsha384-x25519
    encap = yes
    dpd_delay = 2s
    local {
      auth = psk
      id = %s.example.com
    }
    remote {
      auth = psk
      id = vpn.example.com
    }
    children {
%s    }
  }
}
secrets {
  ike-gw {
    id-1 = vpn.example.com
    id-2 = %s.example.com
    secret = "%s"
  }
}
`, public, name, children(cidrs), name, psk))
}

// tail is the last n lines of a log that say something.
func tail(path string, n int) string { return strongswan.Tail(path, n) }

package ipsec

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Retransmission of IKE requests: sent again after 1, 1.3, 1.7, 2.2 and 2.9 s, given up
// 3.7 s after the last: a dead peer is noticed 12.8 s after the first unanswered request
// (strongSwan's defaults: 165 s).
const (
	retransmitTimeout = "1.0"
	retransmitBase    = "1.3"
	retransmitTries   = "5"
)

// daemonTable and daemonRulePriority are where kernel-libipsec's own routes go.
const (
	daemonTable        = netstate.Table + 20
	daemonRulePriority = 32768 // behind main and default; the daemon makes it, we remove it
)

// plugins is all that the daemon loads besides the datapath: no shell hooks (updown), no
// EAP, no fetching of CRLs from the network.
var plugins = []string{
	"random", "nonce", "openssl", "pem", "pkcs1", "pkcs8", "x509", "pubkey", "revocation", "constraints",
	"hmac", "sha1", "sha2", "aes", "gcm", "gmp", "curve25519", "chapoly", "kdf", "mgf1",
	"kernel-netlink", "socket-default", "vici",
}

// DaemonConfig is the strongswan.conf for a daemon of the given program name
// ("charon-systemd") that keeps its files in dir. An external daemon (Options.Socket)
// needs one with the same settings.
func DaemonConfig(program, dir string, datapath netstate.IPsecDatapath) string {
	load := plugins
	if datapath == netstate.LibIPsec {
		load = append([]string{"kernel-libipsec"}, plugins...)
	}
	mark := fmt.Sprintf("%#x/%#x", netstate.MarkOuter, netstate.MarkMask)
	return fmt.Sprintf(`# Written by culvert; changes are lost.
%s {
  load = %s

  # Routes are culvert's own. kernel-libipsec adds some all the same: they go to a table
  # that nothing looks into.
  install_routes = no
  routing_table = %d
  routing_table_prio = %d
  install_virtual_ip = no
  interfaces_ignore = %s

  retransmit_timeout = %s
  retransmit_base = %s
  retransmit_tries = %s
  retry_initiate_interval = 5
  make_before_break = yes
  follow_redirects = no
  send_vendor_id = no

  # Thousands of peers, possibly all behind one translated address.
  ikesa_table_size = 4096
  ikesa_table_segments = 16
  half_open_timeout = 30
  cookie_threshold = 200
  block_threshold = 1000

  journal {
    default = -1
  }
  filelog {
    culvert {
      path = %s
      append = yes
      flush_line = yes
      ike_name = yes
      time_format = %%Y-%%m-%%dT%%H:%%M:%%S
      default = 1
    }
  }
  plugins {
    vici {
      socket = unix://%s
    }
    socket-default {
      # Encapsulated packets never follow a tunnel's route.
      fwmark = %s
    }
    kernel-libipsec {
      allow_peer_ts = yes
    }
  }
}
`, program, strings.Join(load, " "), daemonTable, daemonRulePriority, selectorLink, retransmitTimeout, retransmitBase, retransmitTries,
		filepath.Join(dir, logName), filepath.Join(dir, socketName), mark)
}

// The daemon's files in Options.Dir.
const (
	confName   = "strongswan.conf"
	socketName = "charon.vici"
	logName    = "charon.log"
)

// Socket is the vici socket of the daemon that keeps its files in dir.
func Socket(dir string) string { return filepath.Join(dir, socketName) }

package gateway

import (
	"net/netip"
	"time"
)

// Report is the state of a running gateway, as "culvert status" shows it. It holds no
// secret.
type Report struct {
	Gateway string `json:"gateway"` // "default/edge"; empty: no VPNGateway yet
	// Active means that this process works; else it stands by for another one.
	Active  bool      `json:"active"`
	Key     string    `json:"publicKey,omitempty"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	// Datapath says who encrypts: {"wireguard": "userspace", "ipsec": "libipsec"}.
	Datapath map[string]string `json:"datapath"`
	MTU      map[string]int    `json:"mtu"` // by link
	Applied  time.Time         `json:"applied"`
	// Errors are what could not be applied, by step; empty when all is in effect.
	Errors   map[string]string `json:"errors,omitempty"`
	Sites    []PeerReport      `json:"sites"`
	Devices  []PeerReport      `json:"devices"`
	Problems []ProblemReport   `json:"problems,omitempty"`
	Services ServicesReport    `json:"services"`
	Dropped  map[string]uint64 `json:"dropped,omitempty"` // packets, by reason
}

// PeerReport is one site or device.
type PeerReport struct {
	Name      string         `json:"name"` // "default/berlin"
	Type      string         `json:"type"` // "wireguard" or "ipsec"
	Key       string         `json:"publicKey,omitempty"`
	Link      string         `json:"link,omitempty"` // empty: no part of the state (yet)
	Addresses []netip.Prefix `json:"addresses"`      // a site's ranges, a device's addresses
	Access    string         `json:"access"`
	// Connected means that a handshake or an SA is fresh enough to carry traffic.
	Connected bool   `json:"connected"`
	Endpoint  string `json:"endpoint,omitempty"` // where the peer was last seen
	// Since is the last handshake (WireGuard) or when the SA was established (IPsec).
	Since         time.Time `json:"since,omitzero"`
	ReceivedBytes uint64    `json:"receivedBytes"`
	SentBytes     uint64    `json:"sentBytes"`
	// Paths are the tunnels of a site that has several, or one that is probed.
	Paths   []PathReport `json:"paths,omitempty"`
	Reason  string       `json:"reason,omitempty"`  // why it is not connected
	Message string       `json:"message,omitempty"` // in one line, with what to do
}

// ProblemReport is an object, or a part of one, that is not in effect.
type ProblemReport struct {
	Object  string `json:"object"` // "Site default/berlin"; empty: a file that cannot be read
	Origin  string `json:"origin,omitempty"`
	Field   string `json:"field,omitempty"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
	// Kept means that the last good version of the object, or of the file's objects, stays
	// in effect.
	Kept bool `json:"kept,omitempty"`
}

// ServicesReport is about service addresses.
type ServicesReport struct {
	Mode  string `json:"mode,omitempty"`
	Ports int    `json:"ports"`
}

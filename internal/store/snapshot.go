package store

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// Snapshot is what a gateway in a cluster needs to have its tunnels again without the API
// server: its objects and its key. It holds secrets: the directory of a pod is in memory, and
// goes with the pod.
//
// Services and their endpoints are no part of it: they are many, change all the time, and
// what was made of them is in the kernel still.
type Snapshot struct {
	Objects    model.Objects
	PrivateKey secret.Bytes
	PublicKey  netstate.Key
	Endpoints  map[netstate.Key]netip.AddrPort
}

const snapshotName = "snapshot.json"

// snapshotFile is a Snapshot as it is written.
type snapshotFile struct {
	Gateways   []*v1alpha1.VPNGateway `json:"gateways,omitempty"`
	Sites      []*v1alpha1.Site       `json:"sites,omitempty"`
	Devices    []*v1alpha1.Device     `json:"devices,omitempty"`
	Nodes      []*corev1.Node         `json:"nodes,omitempty"`
	Secrets    []*corev1.Secret       `json:"secrets,omitempty"`
	PrivateKey []byte                 `json:"privateKey"`
	PublicKey  netstate.Key           `json:"publicKey"`
	Endpoints  []endpoint             `json:"endpoints,omitempty"`
}

type endpoint struct {
	Key netstate.Key   `json:"key"`
	At  netip.AddrPort `json:"at"`
}

// SaveSnapshot keeps a snapshot, in the place of the one before.
func (s *Store) SaveSnapshot(v Snapshot) error {
	f := snapshotFile{PrivateKey: v.PrivateKey.Reveal(), PublicKey: v.PublicKey}
	for _, d := range v.Objects.All() {
		switch o := d.Object.(type) {
		case *v1alpha1.VPNGateway:
			f.Gateways = append(f.Gateways, o)
		case *v1alpha1.Site:
			f.Sites = append(f.Sites, o)
		case *v1alpha1.Device:
			f.Devices = append(f.Devices, o)
		case *corev1.Node:
			f.Nodes = append(f.Nodes, o)
		case *corev1.Secret:
			f.Secrets = append(f.Secrets, o)
		}
	}
	for k, at := range v.Endpoints {
		f.Endpoints = append(f.Endpoints, endpoint{k, at})
	}
	return s.writeJSON(snapshotName, f)
}

// Snapshot reads what SaveSnapshot wrote; nil when nothing was.
func (s *Store) Snapshot() (*Snapshot, error) {
	var f snapshotFile
	if err := s.readJSON(snapshotName, &f); err != nil {
		return nil, err
	}
	if len(f.PrivateKey) == 0 {
		return nil, nil
	}
	v := &Snapshot{PrivateKey: secret.New(f.PrivateKey), PublicKey: f.PublicKey, Endpoints: map[netstate.Key]netip.AddrPort{}}
	for _, o := range f.Gateways {
		v.Objects.Add(model.Decoded{Object: o})
	}
	for _, o := range f.Sites {
		v.Objects.Add(model.Decoded{Object: o})
	}
	for _, o := range f.Devices {
		v.Objects.Add(model.Decoded{Object: o})
	}
	for _, o := range f.Nodes {
		v.Objects.Add(model.Decoded{Object: o})
	}
	for _, o := range f.Secrets {
		v.Objects.Add(model.Decoded{Object: o})
	}
	for _, e := range f.Endpoints {
		v.Endpoints[e.Key] = e.At
	}
	return v, nil
}

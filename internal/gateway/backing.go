package gateway

import (
	"context"
	"net/http"
	"net/netip"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// backing is where a gateway has its objects from, and where it keeps what must outlive
// it: a directory of manifests and one of state, or an API server. The loop alone calls
// it, so no method may wait long for anybody.
type backing interface {
	// Name of the step that reading the objects is, in reports.
	Name() string
	// Watch reports changes of the objects until ctx ends; several at once are one.
	Watch(ctx context.Context) (<-chan struct{}, error)
	// Read takes a snapshot. With source.ErrNotSynced there is none yet, and what is in
	// effect on the host stays.
	Read() (model.Objects, []model.Problem, error)
	// Stale lists, by file, objects that are from an earlier version of it.
	Stale() map[string][]model.Ref
	// ParseOptions are what Parse must know for this snapshot.
	ParseOptions(model.Objects) model.ParseOptions
	// Review leaves out problems that are others' business, and says of the rest what Parse
	// cannot know.
	Review([]model.Problem) []model.Problem
	// Active says whether this process is the one of the gateway's that works; known is false
	// as long as that is not decided, and what is in effect on the host then stays.
	Active() (active, known bool)
	// Contested says that another process goes on with what this one gives up.
	Contested() bool
	// WithoutServices says that Services are missing among the objects that were read: what
	// is in effect of them stays.
	WithoutServices() bool
	// Hello is what other processes of the gateway ask; nil: nothing.
	Hello() http.Handler
	// Identity is the gateway's key and where its peers were last seen.
	Identity(ctx context.Context, gw *model.Gateway) (identity, error)
	// Devices fills in the facts about devices: their addresses, and the keys that were
	// made for them.
	Devices(gw *model.Gateway, facts *plan.Facts) ([]model.Problem, error)
	// Save keeps what the objects meant when they were applied.
	Save() error
	// SaveEndpoints keeps where peers were last seen.
	SaveEndpoints(map[netstate.Key]netip.AddrPort) error
	// Tell reports what is in effect, and who is connected, to whoever looks at objects.
	Tell(account)
	// Close ends what runs in the background.
	Close() error
}

// identity is what all of a gateway's lives share.
type identity struct {
	private   secret.Bytes
	public    netstate.Key
	endpoints map[netstate.Key]netip.AddrPort
}

// account is what a gateway knows of itself and of its peers at one time.
type account struct {
	active   bool           // this process is the one that works
	gateway  *model.Gateway // nil: none is in effect
	report   Report
	problems []model.Problem
	kept     map[model.Ref]bool // refused, with an earlier version in effect
	waiting  map[string]string  // as plan.Result.Waiting
}

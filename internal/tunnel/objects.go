package tunnel

import (
	"fmt"
	"strings"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/source/manifests"
)

// FindRemoteCluster picks the RemoteCluster of that name ("NAME" or "NAMESPACE/NAME";
// empty: the only one) from manifests.
func FindRemoteCluster(files *manifests.Files, name string) (*model.RemoteCluster, error) {
	objects, problems, err := files.Read()
	if err != nil {
		return nil, err
	}
	m := model.Parse(objects, model.ParseOptions{})
	problems = append(problems, m.Problems...)
	var names []string
	var found []*model.RemoteCluster
	for _, c := range m.RemoteClusters {
		names = append(names, c.ID.String())
		if name == "" || name == c.ID.String() || name == c.Name {
			found = append(found, c)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return nil, fmt.Errorf("there are %s: say which one by its name", strings.Join(names, ", "))
	}
	for _, p := range problems {
		if p.Kind == model.KindRemoteCluster || p.Kind == "" {
			return nil, fmt.Errorf("%s %s: %s: %s: %s", p.Kind, p.Object, p.Origin, p.Field, p.Message)
		}
	}
	if name != "" && len(names) > 0 {
		return nil, fmt.Errorf("there is no RemoteCluster %q; there is %s", name, strings.Join(names, ", "))
	}
	return nil, fmt.Errorf("there is no RemoteCluster %s in the manifests: write one", name)
}

package agent

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// A network plugin that cannot be encrypted beside shows in every condition: before anything is
// enforced nothing is promised, and afterwards guards stay, with a word about what they miss.
func TestRefusedShows(t *testing.T) {
	const why = "eBPF at the network card"
	for _, enforced := range []bool{false, true} {
		n := node{encryption: &v1alpha1.NodeEncryption{}, model: &model.Model{NodeEncryption: &model.NodeEncryption{Strict: true, Enforced: enforced}}}
		n.facts.Encryption = plan.EncryptionFacts{Refused: why}
		var s v1alpha1.NodeEncryptionStatus
		(&encryption{}).conditions(&s, n, &plan.EncryptionResult{})
		for _, name := range []string{v1alpha1.ConditionAccepted, v1alpha1.ConditionReady, model.ConditionEnforced} {
			c := meta.FindStatusCondition(s.Conditions, name)
			if c == nil || c.Reason != reasonNetworkPlugin || !strings.Contains(c.Message, why) {
				t.Errorf("enforced before: %v: %s is %+v", enforced, name, c)
			}
			if c != nil && (c.Status == "True") != (enforced && name == model.ConditionEnforced) {
				t.Errorf("enforced before: %v: %s is %s", enforced, name, c.Status)
			}
		}
	}
}

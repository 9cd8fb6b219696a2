package encryption

import "testing"

// Steady traffic of pods: nothing in clear, and with encryption off the same filter catches
// plenty.
func TestPods(t *testing.T) {
	c := newCluster(t, 3)
	w := c.watch()
	c.reach(c.podPaths())
	w.plenty("encryption off")
	w.forget()
	c.encrypt()
	w.forget()
	c.reach(c.podPaths())
	w.none("scope Pods")
}

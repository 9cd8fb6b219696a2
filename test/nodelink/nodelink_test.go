package nodelink

import (
	"fmt"
	"testing"
)

func TestBothWays(t *testing.T) {
	c := newCluster(t, 1500)
	c.placeGateway(1, "gateway")
	answer(t, c.site, siteIP, siteIP6)
	c.apply()
	c.bothWays()
	c.transfers()
}

// bothWays sees that the site and the pods of both nodes reach each other, with their own
// addresses.
func (c *cluster) bothWays() {
	t := c.t
	t.Helper()
	for i := 1; i <= 2; i++ {
		for _, f := range []struct{ pod, site string }{{fmt.Sprintf(podAddr, i), siteIP}, {fmt.Sprintf(podAddr6, i), siteIP6}} {
			for _, network := range []string{"tcp", "udp"} {
				reaches(t, c.site, network, f.pod, fmt.Sprintf("pod-%d %s", i, f.site))
				reaches(t, c.pods[i], network, f.site, "site "+f.pod)
			}
		}
	}
}

// transfers sends 10 MiB between the site and the pods, both ways, byte-exact.
func (c *cluster) transfers() {
	c.t.Helper()
	for i := 1; i <= 2; i++ {
		for _, to := range []string{fmt.Sprintf(podAddr, i), fmt.Sprintf(podAddr6, i)} {
			if err := transfer(c.site, to, 10<<20); err != nil {
				c.t.Errorf("10 MiB between site and %s: %v", to, err)
			}
		}
	}
}

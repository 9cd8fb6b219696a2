package faults_test

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
)

// away: the operator is away, then the API server is, too: nobody loses a packet. When they are
// back, what was asked for meanwhile is done, exactly.
func (s *scene) away() {
	p := s.watch()
	s.Kubectl("-n", clustertest.System, "scale", "deployment/culvert-operator", "--replicas=0")
	s.eventually(30*time.Second, "there is no operator", func(context.Context) error {
		if pods := s.Kubectl("-n", clustertest.System, "get", "pods", "-l", "app.kubernetes.io/component=operator", "-o", "name"); pods != "" {
			return fmt.Errorf("%s", pods)
		}
		return nil
	})
	for i := range 10 {
		if err := s.client.Create(s.t.Context(), newDevice(fmt.Sprintf("later-%d", i), "edge")); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := s.StopProgram("control", "kube-apiserver"); err != nil {
		s.t.Fatal(err)
	}
	time.Sleep(5 * time.Second)
	if err := s.StartProgram("control", "kube-apiserver"); err != nil {
		s.t.Fatal(err)
	}
	s.eventually(2*time.Minute, "the API server answers", func(context.Context) error {
		_, err := s.TryKubectl("get", "--raw", "/readyz")
		return err
	})
	for i := range 5 {
		s.remove(newDevice(fmt.Sprintf("later-%d", i), "edge"))
	}
	s.Kubectl("-n", clustertest.System, "scale", "deployment/culvert-operator", "--replicas=2")
	s.eventually(90*time.Second, "everything is as it was asked for", func(ctx context.Context) error { return s.exact(ctx, 6) })
	p.Unharmed()
}

// killed: whenever the operator dies, its successor ends where it would have.
func (s *scene) killed() {
	for i := range 20 {
		if err := s.client.Create(s.t.Context(), newDevice(fmt.Sprintf("killed-%d", i), "edge")); err != nil {
			s.t.Fatal(err)
		}
		if i%2 == 1 {
			s.remove(newDevice(fmt.Sprintf("killed-%d", i-1), "edge"))
		}
		if i%5 == 4 {
			s.Kubectl("-n", clustertest.System, "delete", "pods", "-l", "app.kubernetes.io/component=operator", "--force", "--grace-period=0", "--wait=false")
		}
	}
	s.eventually(90*time.Second, "everything is as it was asked for", func(ctx context.Context) error { return s.exact(ctx, 6+10) })
	s.clear()
	s.eventually(60*time.Second, "nothing is left over", func(ctx context.Context) error { return s.exact(ctx, 1) })
}

// exact reports whether there are n devices, each with an address of its own, a claim, a
// Secret and a peer, and nothing else.
func (s *scene) exact(ctx context.Context, n int) error {
	var devices v1alpha1.DeviceList
	if err := s.client.List(ctx, &devices, client.InNamespace(namespace)); err != nil {
		return err
	}
	owners := map[string]string{}
	for i := range devices.Items {
		d := &devices.Items[i]
		if len(d.Status.Addresses) != 1 {
			return fmt.Errorf("%s has addresses %v", d.Name, d.Status.Addresses)
		}
		if o, taken := owners[d.Status.Addresses[0]]; taken {
			s.t.Fatalf("%s is given to %s and %s", d.Status.Addresses[0], o, d.Name)
		}
		owners[d.Status.Addresses[0]] = d.Name
	}
	count := func(kind, selector string) int {
		return len(strings.Fields(s.Kubectl("-n", namespace, "get", kind, "-l", selector, "-o", "name")))
	}
	claims, secrets := count("leases", "app.kubernetes.io/component=address"), count("secrets", "app.kubernetes.io/component=device")
	peers := strings.Count(s.gateway("culvert", "culvert", "status", "-o", "json"), `"type": "wireguard"`)
	if len(devices.Items) != n || claims != n || secrets != n || peers != n {
		return fmt.Errorf("%d devices, %d claims, %d Secrets, %d peers, want %d of each", len(devices.Items), claims, secrets, peers, n)
	}
	return nil
}

// secrets: what Culvert says, anywhere, is searched for every secret that it knows.
func (s *scene) secrets() {
	var list corev1.SecretList
	if err := s.client.List(s.t.Context(), &list, client.InNamespace(namespace)); err != nil {
		s.t.Fatal(err)
	}
	planted := map[string]string{"the site's key": psk}
	for i := range list.Items {
		for key, value := range list.Items[i].Data {
			if key == "private-key" {
				planted[list.Items[i].Name] = strings.TrimSpace(string(value))
			}
		}
	}
	if len(planted) != 3 { // the gateway's and the phone's, too
		s.t.Fatalf("%d secrets", len(planted))
	}
	texts := map[string]string{}
	say := func(args ...string) { texts["kubectl "+strings.Join(args, " ")], _ = s.TryKubectl(args...) }
	for _, ns := range []string{namespace, clustertest.System} {
		say("-n", ns, "get", "vpngateways,sites,devices,configmaps,leases,statefulsets,deployments,daemonsets,services,endpointslices,roles,rolebindings,pods,events", "-o", "json")
		for name := range strings.FieldsSeq(s.Kubectl("-n", ns, "get", "pods", "-o", "name")) {
			say("-n", ns, "logs", name, "--all-containers")
		}
	}
	for _, container := range []string{"culvert", "ipsec"} {
		say("-n", namespace, "exec", "culvert-edge-0", "-c", container, "--", "sh", "-c", "cat /proc/*/cmdline /proc/*/environ")
	}
	say("get", "--raw", "/api/v1/namespaces/"+namespace+"/pods/culvert-edge-0:9586/proxy/metrics")
	say("-n", namespace, "exec", "culvert-edge-0", "-c", "culvert", "--", "nft", "list", "ruleset")
	say("-n", namespace, "exec", "culvert-edge-0", "-c", "ipsec", "--", "cat", "/run/culvert/ipsec/charon.log", "/run/culvert/ipsec/strongswan.conf")
	for _, args := range [][]string{{"status", "-o", "json", "-n", namespace}, {"status", "-n", namespace}, {"device", "list", "-o", "json", "-n", namespace}, {"plan", "gateway", "--name", namespace + "/edge"}} {
		texts["culvert "+strings.Join(args, " ")] = s.Culvert(args...)
	}
	if status := texts["culvert status -n "+namespace]; !strings.Contains(status, " KiB ") || !strings.Contains(status, "ready") {
		s.t.Errorf("status shows no bytes of the phone, or no agents:\n%s", status)
	}
	searched := 0
	for where, text := range texts {
		if len(text) < 50 {
			s.t.Errorf("%s says nothing: %q", where, text)
		}
		searched += len(text)
		for name, value := range planted {
			for _, needle := range needles(value) {
				if strings.Contains(text, needle) {
					s.t.Errorf("%s: %s shows", where, name)
				}
			}
		}
	}
	// The same search finds them where they belong.
	there := s.Kubectl("-n", namespace, "get", "secrets", "-o", "json")
	for name, value := range planted {
		if !strings.Contains(there, base64.StdEncoding.EncodeToString([]byte(value))) && !strings.Contains(there, base64.StdEncoding.EncodeToString([]byte(value+"\n"))) {
			s.t.Errorf("the search does not find %s in the Secrets", name)
		}
	}
	s.t.Logf("%d texts, %d bytes, %d secrets", len(texts), searched, len(planted))
}

// needles are the forms that a secret may be written in.
func needles(secret string) []string {
	list := []string{secret, base64.StdEncoding.EncodeToString([]byte(secret)), hex.EncodeToString([]byte(secret))}
	if raw, err := base64.StdEncoding.DecodeString(secret); err == nil && len(raw) == 32 {
		list = append(list, string(raw), hex.EncodeToString(raw))
	}
	return list
}

// signal sends the gateway's process a signal.
func (s *scene) signal(name string) {
	s.t.Helper()
	signalled := 0
	for _, n := range s.Nodes {
		if _, err := n.Run(s.t.Context(), "pkill", "-"+name, "-f", "^culvert gateway --namespace "+namespace); err == nil {
			signalled++
		}
	}
	if signalled != 1 {
		s.t.Fatalf("%d gateways got a signal", signalled)
	}
}

// hangs: a gateway that can say nothing any more does not stay Ready, nor what was connected
// through it connected. When it goes on, it says so again.
func (s *scene) hangs() {
	become := func(limit time.Duration, want string) {
		s.eventually(limit, want, func(context.Context) error {
			got := ""
			for _, x := range [][2]string{{"vpngateway/edge", "Ready"}, {"device/phone", "Connected"}} {
				got += s.Kubectl("-n", namespace, "get", x[0], "-o", fmt.Sprintf(`jsonpath=%[1]s {.status.conditions[?(@.type=="%[1]s")].status} {.status.conditions[?(@.type=="%[1]s")].reason}; `, x[1]))
			}
			if got != want {
				return fmt.Errorf("it says %q", got)
			}
			return nil
		})
	}
	const well = "Ready True Ready; Connected True Connected; "
	become(30*time.Second, well)
	start := time.Now()
	s.signal("STOP")
	become(90*time.Second, "Ready False NoReadyPod; Connected Unknown GatewayNotReady; ")
	s.t.Logf("told after %s", time.Since(start).Round(100*time.Millisecond))
	s.signal("CONT") // or it was restarted meanwhile, for it did not answer the kubelet
	start = time.Now()
	become(90*time.Second, well)
	s.t.Logf("told again after %s", time.Since(start).Round(100*time.Millisecond))
}

// deleted: a gateway that does not answer any more holds up no deletion, and leaves nothing on
// the nodes.
func (s *scene) deleted() {
	if s.routes() == "" || !strings.Contains(s.routes(), "10.99.0.0/20") {
		s.t.Fatalf("there is nothing to go: %s", s.routes())
	}
	s.signal("STOP")
	start := time.Now()
	s.Kubectl("-n", namespace, "delete", "vpngateways,sites,devices", "--all", "--wait=false")
	s.eventually(60*time.Second, "everything is gone", func(ctx context.Context) error {
		left, err := s.TryKubectl("-n", namespace, "get", "vpngateways,sites,devices,statefulsets,services,roles,rolebindings,leases,endpointslices,poddisruptionbudgets", "-o", "name")
		if err != nil {
			return err
		}
		pods, err := s.TryKubectl("-n", namespace, "get", "pods", "-l", "app.kubernetes.io/name=culvert", "-o", "name")
		if left+pods != "" || err != nil {
			return fmt.Errorf("%w: %s%s", err, left, pods)
		}
		for _, n := range s.Nodes {
			links, err := n.Output(ctx, "ip", "-brief", "link")
			if err != nil || strings.Contains(links, "cvt") {
				return fmt.Errorf("links of %s: %w: %s", n.Name, err, links)
			}
		}
		if routes := s.routes(); strings.Contains(routes, "10.99.") || strings.Contains(routes, "10.10.") || strings.Contains(routes, "lookup 19610") {
			return fmt.Errorf("routes and rules: %s", routes)
		}
		return nil
	})
	s.t.Logf("gone after %s", time.Since(start).Round(10*time.Millisecond))
}

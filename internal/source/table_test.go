package source

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// counted is a table of Sites and how often it announced a change.
func counted(example metav1.Object) (t *table, news *int) {
	news = new(int)
	return newTable(example, func() client.ObjectList { return nil }, func() { *news++ }), news
}

func site(name string, generation int64, edit func(*v1alpha1.Site)) *v1alpha1.Site {
	s := &v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: name, Generation: generation, UID: "u"}}
	s.Spec.CIDRs = []v1alpha1.RoutedCIDR{"10.1.0.0/16"}
	if edit != nil {
		edit(s)
	}
	return s
}

// What a gateway reports itself, or others count in status, is no news, and leaves the
// very same object in place; whatever changes its meaning is.
func TestOnlyWhatMattersIsNews(t *testing.T) {
	accept := func(generation int64) func(*v1alpha1.Site) {
		return func(s *v1alpha1.Site) {
			s.Status.Conditions = append(s.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionAccepted, Status: metav1.ConditionTrue, ObservedGeneration: generation})
		}
	}
	for name, c := range map[string]struct {
		edit func(*v1alpha1.Site)
		news bool
	}{
		"nothing":            {func(s *v1alpha1.Site) { s.ResourceVersion = "7" }, false},
		"our own conditions": {func(s *v1alpha1.Site) { s.Status.Conditions = []metav1.Condition{{Type: "Connected", Status: "True"}} }, false},
		"what we are to say again": {func(s *v1alpha1.Site) {
			s.Status.Conditions = []metav1.Condition{{Type: "Connected", Status: "Unknown", Reason: model.ReasonHandedBack}}
		}, true},
		"our own path":        {func(s *v1alpha1.Site) { s.Status.Paths = []v1alpha1.SitePath{{Replica: "x"}} }, false},
		"labels":              {func(s *v1alpha1.Site) { s.Labels = map[string]string{"a": "b"} }, false},
		"the spec":            {func(s *v1alpha1.Site) { s.Generation, s.Spec.CIDRs = 2, []v1alpha1.RoutedCIDR{"10.2.0.0/16"} }, true},
		"acceptance":          {accept(1), true},
		"another of its name": {func(s *v1alpha1.Site) { s.UID = "v" }, true},
		"its deletion":        {func(s *v1alpha1.Site) { s.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)} }, true},
	} {
		table, news := counted(&v1alpha1.Site{})
		first := site("berlin", 1, nil)
		if err := table.Replace([]any{first}, "1"); err != nil || *news != 1 {
			t.Fatalf("first list: %v, %d times news", err, *news)
		}
		if err := table.Update(site("berlin", 1, c.edit)); err != nil {
			t.Fatal(err)
		}
		if (*news == 2) != c.news {
			t.Errorf("%s: %d times news, want news %v", name, *news, c.news)
		}
		if same := len(table.snapshot()) == 1 && table.snapshot()[0] == metav1.Object(first); same == c.news {
			t.Errorf("%s: the object is still the very same: %v", name, same)
		}
	}
}

func TestDevicesAddressesAreNews(t *testing.T) {
	device := func(addresses ...string) *v1alpha1.Device {
		d := &v1alpha1.Device{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "phone", Generation: 1}}
		d.Status.Addresses = addresses
		return d
	}
	table, news := counted(&v1alpha1.Device{})
	for i, d := range []*v1alpha1.Device{device(), device("10.99.0.2"), device("10.99.0.2"), device("10.99.0.3")} {
		if err := table.Update(d); err != nil {
			t.Fatal(err)
		}
		if want := []int{1, 2, 2, 3}[i]; *news != want {
			t.Errorf("after update %d: %d times news, want %d", i, *news, want)
		}
	}
}

func TestGatewaysLinkIsNews(t *testing.T) {
	gateway := func(link v1alpha1.NodeLink, reason string) *v1alpha1.VPNGateway {
		g := &v1alpha1.VPNGateway{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "edge", Generation: 1}}
		g.Status.NodeLink = link
		g.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionAccepted, Status: metav1.ConditionFalse, Reason: reason}}
		return g
	}
	table, news := counted(&v1alpha1.VPNGateway{})
	for i, g := range []*v1alpha1.VPNGateway{gateway("", "Overlap"), gateway("Direct", "Overlap"), gateway("Direct", "Overlap"), gateway("Direct", "NetworkPlugin")} {
		if err := table.Update(g); err != nil {
			t.Fatal(err)
		}
		if want := []int{1, 2, 2, 3}[i]; *news != want {
			t.Errorf("after update %d: %d times news, want %d", i, *news, want)
		}
	}
}

// A new list after an outage takes away what is not in it, and announces only that.
func TestListAfterAnOutage(t *testing.T) {
	table, news := counted(&v1alpha1.Site{})
	if err := table.Replace([]any{site("b", 1, nil), site("a", 1, nil)}, "1"); err != nil {
		t.Fatal(err)
	}
	if err := table.Replace([]any{site("a", 1, nil), site("b", 1, nil)}, "2"); err != nil || *news != 1 {
		t.Errorf("the same list: %v, %d times news", err, *news)
	}
	if err := table.Replace([]any{site("b", 1, nil)}, "3"); err != nil || *news != 2 || len(table.snapshot()) != 1 {
		t.Errorf("a shorter list: %v, %d times news, %d objects", err, *news, len(table.snapshot()))
	}
	if err := table.Update(&corev1.Pod{}); err != nil { // a metav1.Object, of another kind: not ours to judge
		t.Error(err)
	}
	if err := table.Update("text"); err == nil {
		t.Error("something that is no object is taken in")
	}
}

// Nothing is handed out before everything was read once: half of the objects would tear
// down the other half's tunnels.
func TestNoSnapshotBeforeEverythingIsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := NewAPI(APIOptions{})
		for _, table := range a.tables[1:] {
			if err := table.Replace(nil, "1"); err != nil {
				t.Fatal(err)
			}
		}
		if _, _, err := a.Read(); !errors.Is(err, ErrNotSynced) {
			t.Errorf("%v, want ErrNotSynced", err)
		}
		if err := a.tables[0].Replace(nil, "1"); err != nil {
			t.Fatal(err)
		}
		close(a.synced)
		if o, _, err := a.Read(); err != nil || o.Count() != 0 {
			t.Errorf("%d objects, %v", o.Count(), err)
		}
	})
}

// A burst of changes is few reports, and the last change is never left out.
func TestBurstsAreFewReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in, out := make(chan struct{}, 1), make(chan struct{}, 1)
		go settleChanges(t.Context(), in, out)
		<-out // the first
		reports := 0
		for range 1000 { // a second of them
			select {
			case in <- struct{}{}:
			default:
			}
			time.Sleep(time.Millisecond)
			select {
			case <-out:
				reports++
			default:
			}
		}
		time.Sleep(time.Second)
		select {
		case <-out:
			reports++
		default:
		}
		if reports < 5 || reports > 15 {
			t.Errorf("%d reports of 1000 changes within a second", reports)
		}
		in <- struct{}{}
		start := time.Now()
		<-out
		if took := time.Since(start); took > 2*quietChanges {
			t.Errorf("a single change is reported after %s", took)
		}
	})
}

package manifests

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
)

const siteText = `apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: NAME, namespace: default}
spec:
  gatewayRef: {name: edge}
  cidrs: [10.1.0.0/16]
  wireguard: {publicKey: AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=}
`

func siteNamed(names ...string) string {
	var docs []string
	for _, n := range names {
		docs = append(docs, strings.ReplaceAll(siteText, "NAME", n))
	}
	return strings.Join(docs, "---\n")
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func names(o model.Objects) []string {
	var out []string
	for _, d := range o.All() {
		out = append(out, d.Ref().ID.Name)
	}
	slices.Sort(out)
	return out
}

func read(t *testing.T, f *Files) ([]string, []model.Problem) {
	t.Helper()
	o, p, err := f.Read()
	if err != nil {
		t.Fatal(err)
	}
	return names(o), p
}

func TestReadFollowsFiles(t *testing.T) {
	dir := t.TempDir()
	f := NewFiles(dir)
	write(t, dir, "a.yaml", siteNamed("a", "b"))
	write(t, dir, "c.yml", siteNamed("c"))
	write(t, dir, "notes.txt", siteNamed("ignored"))
	write(t, dir, ".hidden.yaml", siteNamed("hidden"))
	if got, p := read(t, f); !slices.Equal(got, []string{"a", "b", "c"}) || len(p) > 0 {
		t.Errorf("Read = %v, %v", got, p)
	}
	write(t, dir, "a.yaml", siteNamed("bb"))
	if got, _ := read(t, f); !slices.Equal(got, []string{"bb", "c"}) {
		t.Errorf("Read after an edit = %v", got)
	}
	if err := os.Remove(filepath.Join(dir, "c.yml")); err != nil {
		t.Fatal(err)
	}
	if got, _ := read(t, f); !slices.Equal(got, []string{"bb"}) {
		t.Errorf("Read after a removal = %v", got)
	}
}

func TestUndecodableFileKeepsItsObjects(t *testing.T) {
	dir := t.TempDir()
	f := NewFiles(dir)
	write(t, dir, "a.yaml", siteNamed("a", "b"))
	read(t, f)
	write(t, dir, "a.yaml", siteNamed("a")+"---\nkind: [unfinished\n")
	got, p := read(t, f)
	if !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("objects = %v, want both kept", got)
	}
	if len(p) != 1 || !strings.HasPrefix(p[0].Origin, "a.yaml:") {
		t.Errorf("problems = %+v, want one in a.yaml", p)
	}
	// A second read of the same file must not forget them.
	if got, _ := read(t, f); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("objects after another read = %v", got)
	}
	write(t, dir, "a.yaml", siteNamed("a"))
	if got, p := read(t, f); !slices.Equal(got, []string{"a"}) || len(p) > 0 {
		t.Errorf("after the repair: %v, %v; want b gone", got, p)
	}
}

func TestOriginIsTheDocumentsLine(t *testing.T) {
	decoded, p := Decode([]byte("# comment\n---\n\n"+siteNamed("a", "b")), "f.yaml")
	if len(p) > 0 || len(decoded) != 2 {
		t.Fatalf("Decode: %d objects, %v", len(decoded), p)
	}
	if decoded[0].Origin != "f.yaml:4" || decoded[1].Origin != "f.yaml:12" {
		t.Errorf("origins = %s, %s; want f.yaml:4, f.yaml:12", decoded[0].Origin, decoded[1].Origin)
	}
}

// An edit of a large file costs what it changes: the other documents are not decoded
// again, and yet every message about them names the line where they are now.
func TestEditOfOneDocument(t *testing.T) {
	dir := t.TempDir()
	f := NewFiles(dir)
	var list []string
	for i := range 200 {
		list = append(list, fmt.Sprintf("s%03d", i))
	}
	write(t, dir, "a.yaml", siteNamed(list...))
	before, _, err := f.Read()
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, "a.yaml", "# two\n# lines\n"+siteNamed("s000", "new")+"---\n"+siteNamed(list[1:]...))
	after, problems, err := f.Read()
	if err != nil || len(problems) > 0 || after.Count() != 201 {
		t.Fatalf("%d objects, %v, %v", after.Count(), problems, err)
	}
	old, now := before.All(), after.All()
	lines := strings.Count(siteText, "\n") + 1 // and the "---"
	for i, d := range now {
		if want := fmt.Sprintf("a.yaml:%d", 3+i*lines); d.Origin != want {
			t.Fatalf("%s is at %s, want %s", d.Ref(), d.Origin, want)
		}
		if i >= 2 && d.Object != old[i-1].Object {
			t.Fatalf("%s was decoded again", d.Ref())
		}
	}
	if old[1].Origin != fmt.Sprintf("a.yaml:%d", 1+lines) {
		t.Errorf("the earlier snapshot has changed: %s", old[1].Origin)
	}
}

func TestMissingDirectoryIsAnError(t *testing.T) {
	if _, _, err := NewFiles(filepath.Join(t.TempDir(), "none")).Read(); err == nil {
		t.Error("no error")
	}
}

func TestWatchReportsBurstsOnce(t *testing.T) {
	dir := t.TempDir()
	f := NewFiles(dir)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	changed, err := f.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"a", "bb", "ccc"} {
		write(t, dir, "a.yaml", siteNamed(n))
	}
	select {
	case <-changed:
	case <-time.After(5 * time.Second):
		t.Fatal("no report")
	}
	if got, _ := read(t, f); !slices.Equal(got, []string{"ccc"}) {
		t.Errorf("Read = %v", got)
	}
	select {
	case <-changed:
		t.Error("a second report for one burst")
	case <-time.After(5 * settle):
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", siteNamed("a"))
	write(t, dir, "other.txt", siteNamed("b"))
	o, p, err := Load([]string{dir, filepath.Join(dir, "other.txt"), "-"}, strings.NewReader(siteNamed("c")))
	if err != nil || len(p) > 0 || !slices.Equal(names(o), []string{"a", "b", "c"}) {
		t.Errorf("Load = %v, %v, %v", names(o), p, err)
	}
	if _, _, err := Load([]string{filepath.Join(dir, "none.yaml")}, nil); err == nil {
		t.Error("a missing file is no error")
	}
}

// A manifest that takes its place in one step is reported at once; one that is written in
// place is given the time to be completed, also when another one is replaced meanwhile.
func TestWatchReportsReplacementsSooner(t *testing.T) {
	dir := t.TempDir()
	f := NewFiles(dir)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	changed, err := f.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	replace := func(temporary string) {
		write(t, dir, temporary, siteNamed("a"))
		if err := os.Rename(filepath.Join(dir, temporary), filepath.Join(dir, "a.yaml")); err != nil {
			t.Fatal(err)
		}
	}
	report := func() time.Duration {
		began := time.Now()
		select {
		case <-changed:
		case <-time.After(5 * time.Second):
			t.Fatal("no report")
		}
		return time.Since(began)
	}
	for _, temporary := range []string{".a.yaml", "a.yaml.new", "sedXyZ"} {
		soonest := time.Hour
		for range 10 {
			replace(temporary)
			soonest = min(soonest, report())
		}
		if soonest >= settle {
			t.Errorf("a manifest replaced by way of %s is reported after %s at best", temporary, soonest)
		}
	}
	for range 3 {
		write(t, dir, "b.yaml", siteNamed("b"))
		replace(".a.yaml")
		if d := report(); d < settle/2 {
			t.Errorf("a manifest that is being written is reported after %s", d)
		}
	}
	write(t, dir, ".c.yaml", siteNamed("c"))
	select {
	case <-changed:
		t.Error("a hidden file is reported")
	case <-time.After(5 * settle):
	}
}

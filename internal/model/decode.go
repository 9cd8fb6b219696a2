package model

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"

	yaml "go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// decodable are the kinds that Decode returns, by apiVersion and kind.
var decodable = map[[2]string]func() metav1.Object{
	{groupVersion, KindGateway}:                func() metav1.Object { return &v1alpha1.VPNGateway{} },
	{groupVersion, KindSite}:                   func() metav1.Object { return &v1alpha1.Site{} },
	{groupVersion, KindDevice}:                 func() metav1.Object { return &v1alpha1.Device{} },
	{groupVersion, KindRemoteCluster}:          func() metav1.Object { return &v1alpha1.RemoteCluster{} },
	{groupVersion, KindNodeEncryption}:         func() metav1.Object { return &v1alpha1.NodeEncryption{} },
	{groupVersion, KindNodeTunnel}:             func() metav1.Object { return &v1alpha1.NodeTunnel{} },
	{"v1", KindService}:                        func() metav1.Object { return &corev1.Service{} },
	{"v1", KindSecret}:                         func() metav1.Object { return &corev1.Secret{} },
	{"discovery.k8s.io/v1", KindEndpointSlice}: func() metav1.Object { return &discoveryv1.EndpointSlice{} },
}

var (
	groupVersion = v1alpha1.GroupVersion.String()
	ourKinds     = []string{KindGateway, KindSite, KindDevice, KindRemoteCluster, KindNodeEncryption, KindNodeTunnel}
)

// maximumDepth is how deep a document may nest; ours need less than ten.
const maximumDepth = 64

// Decode reads the objects of one YAML or JSON document: one, or those of a List. The
// origin is where the document's first line that is not blank is, "site.yaml:12", or any
// text without a line.
//
// Culvert's own kinds are read strictly: unknown and doubled fields and values of a wrong
// type are errors, all of them said at once, each with its field path, and the object is
// left out. Services, EndpointSlices and Secrets may have fields that are not known here.
// Other kinds are left out with a problem of ReasonIgnored that is no error, ConfigMaps
// without one. Anchors and aliases are refused. A document without content is nothing.
func Decode(doc []byte, origin string) ([]Decoded, []Problem) {
	d := &decoder{origin: origin}
	d.file, d.line = splitOrigin(origin)
	if trimmed := bytes.TrimLeft(doc, " \t\r\n"); d.line > 0 {
		d.line -= bytes.Count(doc[:len(doc)-len(trimmed)], []byte("\n"))
	}
	dec := yaml.NewDecoder(bytes.NewReader(doc))
	for {
		var root yaml.Node
		err := dec.Decode(&root)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			d.problems = append(d.problems, Problem{Origin: origin, Reason: ReasonInvalidManifest, Message: oneLine(d.syntax(err))})
			break
		}
		if len(root.Content) == 1 && !isNull(root.Content[0]) {
			d.object(root.Content[0], 0)
		}
	}
	return d.objects, d.problems
}

// decoder carries what the parts of one Decode share.
type decoder struct {
	origin, file string
	line         int // of the file, where the text's first line is; 0: unknown
	objects      []Decoded
	problems     []Problem
}

// splitOrigin takes "site.yaml:12" apart; line is 0 when there is none.
func splitOrigin(origin string) (file string, line int) {
	if i := strings.LastIndexByte(origin, ':'); i >= 0 {
		if n, err := strconv.Atoi(origin[i+1:]); err == nil && n > 0 {
			return origin[:i], n
		}
	}
	return origin, 0
}

// at is the origin of a node.
func (d *decoder) at(n *yaml.Node) string {
	if d.line == 0 || n.Line == 0 {
		return d.origin
	}
	return d.file + ":" + strconv.Itoa(d.line+n.Line-1)
}

// syntax says what the YAML parser says, with the file's line numbers.
func (d *decoder) syntax(err error) string {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if number, what, ok := strings.Cut(rest, ": "); ok {
			if n, err := strconv.Atoi(number); err == nil {
				text = what
				if d.line > 0 {
					text += fmt.Sprintf(" (line %d)", d.line+n-1)
				}
			}
		}
	}
	return "is not YAML: " + text + ": check indentation, colons and quotes there"
}

// object decodes one object, or the items of a List.
func (d *decoder) object(n *yaml.Node, depth int) {
	problem := Problem{Origin: d.at(n), Reason: ReasonInvalidManifest}
	say := func(format string, args ...any) {
		problem.Message = oneLine(fmt.Sprintf(format, args...))
		d.problems = append(d.problems, problem)
	}
	if n.Kind != yaml.MappingNode {
		say("is %s, not an object: write apiVersion, kind, metadata and spec", describe(n))
		return
	}
	apiVersion, kind := child(n, "apiVersion"), child(n, "kind")
	if !isText(apiVersion) || !isText(kind) {
		say("has no apiVersion or no kind: write the two, such as apiVersion: %s and kind: %s", groupVersion, KindSite)
		return
	}
	problem.Kind = kind.Value
	problem.Object = nodeID(n)
	if strings.HasSuffix(kind.Value, "List") && depth == 0 && (apiVersion.Value == "v1" || apiVersion.Value == groupVersion) {
		if items := child(n, "items"); items != nil && items.Kind == yaml.SequenceNode {
			for _, item := range items.Content {
				d.object(item, depth+1)
			}
			return
		}
	}
	create := decodable[[2]string{apiVersion.Value, kind.Value}]
	if create == nil {
		d.foreign(problem, apiVersion.Value, kind.Value)
		return
	}
	o := create()
	w := &walker{d: d, ours: apiVersion.Value == groupVersion, kind: kind.Value, id: nodeID(n)}
	w.walk(n, reflect.TypeOf(o).Elem(), nil, 0)
	if w.failed {
		return
	}
	if err := json.Unmarshal(w.json, o); err != nil {
		// The walk has found what people get wrong; a Secret's value may be in the error.
		problem.Object = w.id
		say("cannot be read as a %s: compare it with 'kubectl explain %s'", kind.Value, strings.ToLower(kind.Value))
		return
	}
	d.objects = append(d.objects, Decoded{Object: o, Origin: d.at(n)})
}

// foreign says why a kind is not decoded.
func (d *decoder) foreign(p Problem, apiVersion, kind string) {
	group, _, _ := strings.Cut(apiVersion, "/")
	ourKind := ""
	for _, k := range ourKinds {
		if strings.EqualFold(k, kind) {
			ourKind = k
		}
	}
	switch {
	case group == v1alpha1.GroupVersion.Group && ourKind != "":
		p.Message = fmt.Sprintf("apiVersion %s with kind %s is not known: write %s and %s", quote(apiVersion), quote(kind), groupVersion, ourKind)
	case group == v1alpha1.GroupVersion.Group:
		p.Message = fmt.Sprintf("kind %s is not known: write one of %s", quote(kind), choice(ourKinds))
	case ourKind != "":
		p.Message = fmt.Sprintf("apiVersion %s has no %s: write %s", quote(apiVersion), ourKind, groupVersion)
	case kind == "ConfigMap":
		return
	default:
		p.Reason, p.Pending = ReasonIgnored, true
		p.Message = "is not an object that Culvert reads: it is ignored"
	}
	p.Message = oneLine(p.Message)
	p.Kind = oneLine(p.Kind)
	d.problems = append(d.problems, p)
}

// nodeID is the name of an object that may be broken, as far as it can be told.
func nodeID(n *yaml.Node) ID {
	var id ID
	if m := child(n, "metadata"); m != nil && m.Kind == yaml.MappingNode {
		if name := child(m, "name"); name != nil && name.Kind == yaml.ScalarNode {
			id.Name = oneLine(name.Value)
		}
		if ns := child(m, "namespace"); ns != nil && ns.Kind == yaml.ScalarNode {
			id.Namespace = oneLine(ns.Value)
		}
	}
	kind := child(n, "kind")
	if id.Namespace == "" && (kind == nil || kind.Value != KindNodeEncryption && kind.Value != KindNodeTunnel) {
		id.Namespace = DefaultNamespace
	}
	return id
}

// child is the value of a key of a mapping; nil when it has none.
func child(n *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

func isText(n *yaml.Node) bool { return n != nil && n.Kind == yaml.ScalarNode && n.Tag == "!!str" }

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

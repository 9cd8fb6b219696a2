package cli

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"text/template"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/internal/workload"
)

// spokeManifest is what is printed for the remote cluster.
type spokeManifest struct {
	Namespace, Image, PullPolicy, Proxy string
	Replicas                            int

	Name          string // of all its objects
	RemoteCluster string // namespace/name
	Invitation    string
	Digest        string // of the invitation: another one restarts the spokes
	Exports       []exportPort
}

// exportPort is an export that others in the remote cluster can reach.
type exportPort struct {
	Name string
	Port uint16
}

// complete checks the flags before a token is made.
func (m *spokeManifest) complete(ctx context.Context, h *hubsOf) error {
	if !slices.Contains([]string{"Always", "IfNotPresent", "Never"}, m.PullPolicy) {
		return usagef("--image-pull-policy %q: use Always, IfNotPresent or Never", m.PullPolicy)
	}
	if m.Replicas < 1 || m.Replicas > 64 {
		return usagef("--replicas %d: use 1 to 64", m.Replicas)
	}
	if m.Image == "" {
		image, err := imageOfHubs(ctx, h)
		if err != nil {
			return fmt.Errorf("which image the spokes are to run: %w: give --image", err)
		}
		m.Image = image
	}
	return nil
}

// imageOfHubs is what the hubs run.
func imageOfHubs(ctx context.Context, h *hubsOf) (string, error) {
	var set appsv1.StatefulSet
	if err := h.Get(ctx, client.ObjectKey{Namespace: h.object.Namespace, Name: workload.HubName(h.object.Name)}, &set); err != nil {
		return "", h.explain(err)
	}
	for _, c := range set.Spec.Template.Spec.Containers {
		if c.Name == workload.ContainerCulvert {
			return c.Image, nil
		}
	}
	return "", fmt.Errorf("StatefulSet %s has no container %s", set.Name, workload.ContainerCulvert)
}

// print writes the manifest.
func (m *spokeManifest) print(out io.Writer, h *hubsOf, invitation string) error {
	x := *m
	x.Name, x.RemoteCluster, x.Invitation = workload.SpokeName(h.object.Name), h.parsed.String(), indent(invitation, 4)
	sum := sha256.Sum256([]byte(invitation))
	x.Digest = hex.EncodeToString(sum[:8])
	for _, e := range h.parsed.Exports {
		if a := e.Listen.Addr(); !a.IsLoopback() && a != (netip.Addr{}) {
			x.Exports = append(x.Exports, exportPort{e.Name, e.Listen.Port()})
		}
	}
	return spokeTemplate.Execute(out, x)
}

var spokeTemplate = template.Must(template.New("spoke").Funcs(template.FuncMap{
	"noProxy": func() string {
		return strings.Join([]string{"localhost", net.IPv4(127, 0, 0, 1).String(), ".svc"}, ",")
	},
}).Parse(`# For the remote cluster of RemoteCluster {{.RemoteCluster}}: kubectl apply -f this. It holds a token
# that works once and for one hour, and no key: the spokes make theirs and keep it in the Secret
# {{.Name}} there.
apiVersion: v1
kind: Namespace
metadata:
  name: {{.Namespace}}
  labels:
    pod-security.kubernetes.io/enforce: restricted
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: {{.Name}}, namespace: {{.Namespace}}}
---
# All that the spokes may do in this cluster: keep their own key and certificate.
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: {{.Name}}, namespace: {{.Namespace}}}
rules:
- apiGroups: [""]
  resources: [secrets]
  resourceNames: [{{.Name}}]
  verbs: [get, update]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: {{.Name}}, namespace: {{.Namespace}}}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{.Name}}}
subjects:
- {kind: ServiceAccount, name: {{.Name}}, namespace: {{.Namespace}}}
---
# Empty: the spokes fill it. Applying this again does not empty it.
apiVersion: v1
kind: Secret
metadata: {name: {{.Name}}, namespace: {{.Namespace}}}
type: Opaque
---
apiVersion: v1
kind: Secret
metadata: {name: {{.Name}}-invitation, namespace: {{.Namespace}}}
type: Opaque
stringData:
  invitation.yaml: |
{{.Invitation}}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{.Name}}
  namespace: {{.Namespace}}
  labels: {app.kubernetes.io/name: culvert, app.kubernetes.io/component: spoke, app.kubernetes.io/instance: {{.Name}}}
spec:
  replicas: {{.Replicas}}
  selector:
    matchLabels: {app.kubernetes.io/component: spoke, app.kubernetes.io/instance: {{.Name}}}
  template:
    metadata:
      labels: {app.kubernetes.io/name: culvert, app.kubernetes.io/component: spoke, app.kubernetes.io/instance: {{.Name}}}
      annotations: {culvert.dev/invitation: "{{.Digest}}"}
    spec:
      serviceAccountName: {{.Name}}
      enableServiceLinks: false
      terminationGracePeriodSeconds: 70
      securityContext:
        runAsNonRoot: true
        runAsUser: 65532
        runAsGroup: 65532
        fsGroup: 65532
        seccompProfile: {type: RuntimeDefault}
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: ScheduleAnyway
        labelSelector:
          matchLabels: {app.kubernetes.io/component: spoke, app.kubernetes.io/instance: {{.Name}}}
      containers:
      - name: spoke
        image: {{printf "%q" .Image}}
        imagePullPolicy: {{.PullPolicy}}
        command: [culvert-tunnel]
        args:
        - spoke
        - --join=/etc/culvert/invitation.yaml
        - --state-secret={{.Name}}
        - --http=:9588
        - --log-format=json
{{- if .Proxy}}
        env:
        - {name: HTTPS_PROXY, value: {{printf "%q" .Proxy}}}
        - {name: NO_PROXY, value: {{printf "%q" noProxy}}}
{{- end}}
        ports:
        - {name: http, containerPort: 9588}
{{- range .Exports}}
        - {containerPort: {{.Port}}}
{{- end}}
        livenessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 10, failureThreshold: 6}
        readinessProbe: {httpGet: {path: /readyz, port: http}, periodSeconds: 5}
        resources: {requests: {cpu: 20m, memory: 32Mi}}
        securityContext:
          allowPrivilegeEscalation: false
          readOnlyRootFilesystem: true
          capabilities: {drop: [ALL]}
        volumeMounts:
        - {name: invitation, mountPath: /etc/culvert, readOnly: true}
      volumes:
      - name: invitation
        secret: {secretName: {{.Name}}-invitation}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: {{.Name}}, namespace: {{.Namespace}}}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {app.kubernetes.io/component: spoke, app.kubernetes.io/instance: {{.Name}}}
{{- if .Exports}}
---
# What the other side exports.
apiVersion: v1
kind: Service
metadata: {name: {{.Name}}, namespace: {{.Namespace}}}
spec:
  selector: {app.kubernetes.io/component: spoke, app.kubernetes.io/instance: {{.Name}}}
  ports:
{{- range .Exports}}
  - {name: {{.Name}}, port: {{.Port}}}
{{- end}}
{{- end}}
`))

// egressTemplate takes the RemoteCluster, the objects' name, the namespace, the service
// account and the invitation.
const egressTemplate = `# For the namespace of RemoteCluster %[1]s: kubectl apply -f this. It holds a token that works once
# and for one hour, and no key. A container 'culvert-tunnel egress' of a pod with service
# account %[4]s then needs --state-secret=%[2]s and --join=FILE, FILE being the key
# invitation.yaml of the Secret %[2]s-invitation.
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: %[2]s, namespace: %[3]s}
rules:
- apiGroups: [""]
  resources: [secrets]
  resourceNames: [%[2]s]
  verbs: [get, update]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: %[2]s, namespace: %[3]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: %[2]s}
subjects:
- {kind: ServiceAccount, name: %[4]s, namespace: %[3]s}
---
# Empty: the egress fills it. Applying this again does not empty it.
apiVersion: v1
kind: Secret
metadata: {name: %[2]s, namespace: %[3]s}
type: Opaque
---
apiVersion: v1
kind: Secret
metadata: {name: %[2]s-invitation, namespace: %[3]s}
type: Opaque
stringData:
  invitation.yaml: |
%[5]s
`

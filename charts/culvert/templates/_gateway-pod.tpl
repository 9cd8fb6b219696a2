{{- /* The PodTemplateSpec that the operator lays over every gateway's pods: gatewayPods.template over
what the other keys of gatewayPods say. */}}
{{- define "culvert.gatewayPod" -}}
{{- if and (not .Values.agent.enabled) (eq .Values.gatewayPods.sysctls "Agent") }}
{{- fail "agent.enabled is false, so that nobody turns forwarding on in gateway pods (gatewayPods.sysctls: Agent): set gatewayPods.sysctls to InitContainer or Kubelet, or agent.enabled to true" }}
{{- end }}
{{- $pods := .Values.gatewayPods }}
{{- $culvert := dict "name" "culvert" }}
{{- $ipsec := dict "name" "ipsec" }}
{{- with $pods.resources }}{{ $_ := set $culvert "resources" . }}{{ end }}
{{- with $pods.extraEnv }}{{ $_ := set $culvert "env" . }}{{ end }}
{{- with $pods.ipsecResources }}{{ $_ := set $ipsec "resources" . }}{{ end }}
{{- $containers := list }}
{{- if gt (len $culvert) 1 }}{{ $containers = append $containers $culvert }}{{ end }}
{{- if gt (len $ipsec) 1 }}{{ $containers = append $containers $ipsec }}{{ end }}
{{- $spec := include "culvert.placement" $pods | fromYaml | default dict }}
{{- with $containers }}{{ $_ := set $spec "containers" . }}{{ end }}
{{- $sysctls := list "net.ipv4.ip_forward=1" "net.ipv6.conf.all.forwarding=1" "net.ipv4.conf.all.rp_filter=2" }}
{{- if eq $pods.sysctls "Kubelet" }}
{{- /* What the operator itself sets stands here again: the list replaces its. */}}
{{- $list := list (dict "name" "net.ipv4.ping_group_range" "value" "0 2147483647") }}
{{- range $sysctls }}{{ $list = append $list (dict "name" (splitList "=" . | first) "value" (splitList "=" . | last)) }}{{ end }}
{{- $_ := set $spec "securityContext" (dict "sysctls" $list) }}
{{- else if eq $pods.sysctls "InitContainer" }}
{{- $script := "for s; do f=/proc/sys/$(echo ${s%=*} | tr . /); [ ! -e $f ] || echo ${s#*=} >$f || exit; done" }}
{{- $_ := set $spec "initContainers" (list (dict
  "name" "sysctls" "image" (include "culvert.image" .) "imagePullPolicy" .Values.image.pullPolicy
  "command" (concat (list "sh" "-c" $script "sysctls") $sysctls)
  "securityContext" (dict "privileged" true "readOnlyRootFilesystem" true "runAsUser" 0))) }}
{{- end }}
{{- with .Values.imagePullSecrets }}{{ $_ := set $spec "imagePullSecrets" . }}{{ end }}
{{- $metadata := dict }}
{{- with merge (dict) $pods.podLabels .Values.commonLabels }}{{ $_ := set $metadata "labels" . }}{{ end }}
{{- with $pods.podAnnotations }}{{ $_ := set $metadata "annotations" . }}{{ end }}
{{- $template := dict }}
{{- with $metadata }}{{ $_ := set $template "metadata" . }}{{ end }}
{{- with $spec }}{{ $_ := set $template "spec" . }}{{ end }}
{{- mergeOverwrite $template (deepCopy $pods.template) | toYaml }}
{{- end }}

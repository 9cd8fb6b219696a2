{{- /* The PodTemplateSpec that the operator lays over every gateway's pods: gatewayPods.template over
what the other keys of gatewayPods say. */}}
{{- define "culvert.gatewayPod" -}}
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
{{- with .Values.imagePullSecrets }}{{ $_ := set $spec "imagePullSecrets" . }}{{ end }}
{{- $metadata := dict }}
{{- with merge (dict) $pods.podLabels .Values.commonLabels }}{{ $_ := set $metadata "labels" . }}{{ end }}
{{- with $pods.podAnnotations }}{{ $_ := set $metadata "annotations" . }}{{ end }}
{{- $template := dict }}
{{- with $metadata }}{{ $_ := set $template "metadata" . }}{{ end }}
{{- with $spec }}{{ $_ := set $template "spec" . }}{{ end }}
{{- mergeOverwrite $template (deepCopy $pods.template) | toYaml }}
{{- end }}

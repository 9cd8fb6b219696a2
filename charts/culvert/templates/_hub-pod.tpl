{{- /* The PodTemplateSpec that the operator lays over every hub's pods: hubPods.template over what the
other keys of hubPods say. */}}
{{- define "culvert.hubPod" -}}
{{- $pods := .Values.hubPods }}
{{- $culvert := dict "name" "culvert" }}
{{- with $pods.resources }}{{ $_ := set $culvert "resources" . }}{{ end }}
{{- with $pods.extraEnv }}{{ $_ := set $culvert "env" . }}{{ end }}
{{- $spec := include "culvert.placement" $pods | fromYaml | default dict }}
{{- if gt (len $culvert) 1 }}{{ $_ := set $spec "containers" (list $culvert) }}{{ end }}
{{- with .Values.imagePullSecrets }}{{ $_ := set $spec "imagePullSecrets" . }}{{ end }}
{{- $metadata := dict }}
{{- with merge (dict) $pods.podLabels .Values.commonLabels }}{{ $_ := set $metadata "labels" . }}{{ end }}
{{- with $pods.podAnnotations }}{{ $_ := set $metadata "annotations" . }}{{ end }}
{{- $template := dict }}
{{- with $metadata }}{{ $_ := set $template "metadata" . }}{{ end }}
{{- with $spec }}{{ $_ := set $template "spec" . }}{{ end }}
{{- mergeOverwrite $template (deepCopy $pods.template) | toYaml }}
{{- end }}

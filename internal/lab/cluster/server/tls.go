package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// serveTLS is an admission webhook at /admit, which refuses what has the label "probe:
// refuse", and an aggregated API below /apis/, on TCP 8443, with the certificate and key of
// two files.
func serveTLS(certificate, key string) error {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /admit", admit)
	mux.HandleFunc("GET /apis/{group}/{version}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"kind":"APIResourceList","apiVersion":"v1","groupVersion":%q,"resources":[]}`, r.PathValue("group")+"/"+r.PathValue("version"))
	})
	mux.HandleFunc("GET /apis/{group}/{version}/{what}", func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "aggregated %s for %s\n", r.PathValue("what"), strings.Join(r.Header.Values("X-Remote-User"), ","))
	})
	s := &http.Server{Addr: ":8443", Handler: mux, ReadHeaderTimeout: time.Minute}
	return s.ListenAndServeTLS(certificate, key)
}

// admit answers an AdmissionReview (admission.k8s.io/v1).
func admit(w http.ResponseWriter, r *http.Request) {
	var review struct {
		Request struct {
			UID    string `json:"uid"`
			Object struct {
				Metadata struct {
					Labels map[string]string `json:"labels"`
				} `json:"metadata"`
			} `json:"object"`
		} `json:"request"`
	}
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	allowed := review.Request.Object.Metadata.Labels["probe"] != "refuse"
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
		"response": map[string]any{"uid": review.Request.UID, "allowed": allowed, "status": map[string]any{"message": "refused by the webhook"}},
	})
}

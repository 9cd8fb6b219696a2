package podapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Times of a watch.
const (
	watchFor   = 5 * time.Minute // asked of the server; then it begins anew
	watchGrace = 20 * time.Second
	retryFirst = 500 * time.Millisecond
	retryLast  = 15 * time.Second
)

// Watch calls changed with every state of one object, the present one first, until ctx
// ends; nil: it is gone. A connection that is lost is made anew: nothing is missed but
// states in between. trouble is told what goes wrong, and nil when it is over.
func (c *Client) Watch(ctx context.Context, path string, changed func(object json.RawMessage), trouble func(error)) {
	pause := retryFirst
	for ctx.Err() == nil {
		began := time.Now()
		err := c.watchOnce(ctx, path, changed, trouble)
		if ctx.Err() != nil {
			return
		}
		if err == nil || time.Since(began) > retryLast {
			pause = retryFirst
		}
		if err != nil {
			trouble(err)
		}
		// Spread, so that a thousand hubs do not come back at once.
		wait := pause/2 + rand.N(pause)
		pause = min(2*pause, retryLast)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// object is what a watch needs to know of one.
type object struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
}

// watchOnce reads the object and follows it; nil means that the server ended the watch
// as it was asked to.
func (c *Client) watchOnce(ctx context.Context, path string, changed func(json.RawMessage), trouble func(error)) error {
	collection, name := path[:strings.LastIndexByte(path, '/')], path[strings.LastIndexByte(path, '/')+1:]
	var raw json.RawMessage
	version := ""
	err := c.Get(ctx, path, &raw)
	switch {
	case errors.Is(err, ErrNotFound):
		changed(nil)
	case err != nil:
		return err
	default:
		var o object
		if err := json.Unmarshal(raw, &o); err != nil {
			return err
		}
		version = o.Metadata.ResourceVersion
		changed(raw)
	}
	trouble(nil)
	q := url.Values{
		"watch": {"true"}, "fieldSelector": {"metadata.name=" + name}, "timeoutSeconds": {strconv.Itoa(int(watchFor.Seconds()))},
	}
	if version != "" {
		q.Set("resourceVersion", version)
	}
	ctx, cancel := context.WithTimeout(ctx, watchFor+watchGrace)
	defer cancel()
	res, err := c.do(ctx, request{method: http.MethodGet, path: collection + "?" + q.Encode()})
	if err != nil {
		return err
	}
	defer res.Body.Close()
	d := json.NewDecoder(res.Body)
	for {
		var event struct {
			Type   string          `json:"type"`
			Object json.RawMessage `json:"object"`
		}
		if err := d.Decode(&event); err != nil {
			return nil // ended, by whoever: begin anew
		}
		switch event.Type {
		case "ADDED", "MODIFIED":
			changed(event.Object)
		case "DELETED":
			changed(nil)
		case "ERROR":
			return fmt.Errorf("API server: watch of %s: %.200s", path, event.Object)
		}
	}
}

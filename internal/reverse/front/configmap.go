package front

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/culvert-vpn/culvert/internal/podapi"
)

// Keys of a ConfigMap with a table: plain, or compressed with gzip when it is large.
const (
	RoutesKey           = "routes.yaml"
	CompressedRoutesKey = "routes.yaml.gz"
)

// ConfigMap is a Source: a ConfigMap that is followed, which a volume would be a minute
// late to do.
type ConfigMap struct {
	api             *podapi.Client
	namespace, name string

	mu   sync.Mutex
	data []byte // of the table; nil: there is no ConfigMap, or none was read
	err  error  // of reaching it
	last []byte // what was read last
	read bool
	// asked: the API server has answered.
	asked bool
}

// NewConfigMap is for a ConfigMap in the pod's namespace.
func NewConfigMap(api *podapi.Client, name string) *ConfigMap {
	return &ConfigMap{api: api, namespace: api.Namespace(), name: name}
}

// configMap is what is needed of one.
type configMap struct {
	Data       map[string]string `json:"data"`
	BinaryData map[string][]byte `json:"binaryData"`
}

// Read implements Source. The first time it asks the API server, so that a front does not
// listen before it knows its table. Without a ConfigMap the table is empty; one that goes
// later changes nothing.
func (c *ConfigMap) Read() (Table, bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.asked {
		var raw json.RawMessage
		err := c.api.Get(context.Background(), podapi.ConfigMap(c.namespace, c.name), &raw)
		if err != nil && !errors.Is(err, podapi.ErrNotFound) {
			return Table{}, true, err
		}
		if c.asked = true; err == nil {
			c.data, c.err = tableOf(raw)
		}
	}
	if c.err != nil {
		return Table{}, true, c.err
	}
	if c.data == nil || c.read && bytes.Equal(c.data, c.last) {
		return Table{}, false, nil
	}
	c.last, c.read = c.data, true
	t, err := ParseTable(c.data)
	if err != nil {
		err = fmt.Errorf("ConfigMap %s/%s: %w", c.namespace, c.name, err)
	}
	return t, true, err
}

// Watch implements Source.
func (c *ConfigMap) Watch(ctx context.Context, look func()) error {
	c.api.Watch(ctx, podapi.ConfigMap(c.namespace, c.name), func(raw json.RawMessage) {
		c.set(raw)
		look()
	}, func(err error) {
		c.mu.Lock()
		c.err = err
		c.mu.Unlock()
		if err != nil {
			look()
		}
	})
	return ctx.Err()
}

func (c *ConfigMap) set(raw json.RawMessage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = nil
	if raw == nil {
		return
	}
	c.data, c.err = tableOf(raw)
}

// tableOf is the table's text in a ConfigMap.
func tableOf(raw json.RawMessage) ([]byte, error) {
	var o configMap
	if err := json.Unmarshal(raw, &o); err != nil {
		return nil, err
	}
	if text, ok := o.Data[RoutesKey]; ok {
		return []byte(text), nil
	}
	z, ok := o.BinaryData[CompressedRoutesKey]
	if !ok {
		return nil, errors.New("the ConfigMap has neither " + RoutesKey + " nor " + CompressedRoutesKey)
	}
	r, err := gzip.NewReader(bytes.NewReader(z))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(r, maxFile+1))
}

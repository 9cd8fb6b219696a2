package route

import "net/netip"

// Lookup finds the path of a packet without a mark.
func (r *Route) Lookup(dst netip.Addr) (Underlay, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	list, err := r.h.RouteGet(dst.AsSlice())
	if err != nil {
		return Underlay{}, err
	}
	return r.underlayOf(list[0])
}

package netstate

// A site can be joined by several tunnels, each through a link of its own: paths. What is
// opened towards the site follows the routes in Table; what belongs to a connection that
// goes through a certain path already follows that path's table, which a mark leads to.

// MostPaths is how many paths there can be to one site.
const MostPaths = 4

// PathTable is the routing table of the first path; those of the others follow.
const PathTable = 19640

// MarkPath is the mark, of packets and connections, that leads to the table of path i.
func MarkPath(i int) uint32 { return 0x00d00000 + uint32(i)<<16 }

// Pin keeps a connection on the path that its opener's last packet went through.
type Pin struct {
	Link string // of the path
	Mark uint32 // MarkPath, set on connections through Link and on what belongs to them
}

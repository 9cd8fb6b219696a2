package nft

import (
	"encoding/binary"
	"fmt"
)

// digest is a hash that can be summed: the sum over a set does not depend on the order,
// and an element is taken out again by subtraction.
type digest [2]uint64

func digestOf(sum []byte) digest {
	return digest{binary.BigEndian.Uint64(sum), binary.BigEndian.Uint64(sum[8:])}
}

func (d *digest) add(x digest)      { d[0], d[1] = d[0]+x[0], d[1]+x[1] }
func (d *digest) subtract(x digest) { d[0], d[1] = d[0]-x[0], d[1]-x[1] }

// String is 32 hexadecimal digits.
func (d digest) String() string { return fmt.Sprintf("%016x%016x", d[0], d[1]) }

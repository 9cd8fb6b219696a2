package manifests

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/culvert-vpn/culvert/internal/model"
)

// Decode splits a file into its documents and decodes each; origin names the file in
// messages.
func Decode(data []byte, origin string) ([]model.Decoded, []model.Problem) {
	var out []model.Decoded
	var problems []model.Problem
	for _, p := range decode(data, origin, nil) {
		out = append(out, p.decoded...)
		problems = append(problems, p.problems...)
	}
	return out, problems
}

// part is what one document of a file was decoded to.
type part struct {
	sum      [sha256.Size]byte // of its text
	line     int
	decoded  []model.Decoded
	problems []model.Problem
}

// decode decodes the documents of a file. Those that an earlier version of the file had as
// well are taken from known: an edit of a file with thousands of objects costs what it
// changes.
func decode(data []byte, origin string, known map[[sha256.Size]byte]part) []part {
	docs := split(data)
	parts := make([]part, len(docs))
	inParallel(len(docs), func(i int) {
		doc := docs[i]
		sum := sha256.Sum256(doc.text)
		if p, ok := known[sum]; ok {
			parts[i] = p.at(doc.line, origin)
			return
		}
		p := part{sum: sum, line: doc.line}
		p.decoded, p.problems = model.Decode(doc.text, fmt.Sprintf("%s:%d", origin, doc.line))
		parts[i] = p
	})
	return parts
}

// at is the same document at another line of the file.
func (p part) at(line int, origin string) part {
	by := line - p.line
	if by == 0 {
		return p
	}
	moved := part{sum: p.sum, line: line, decoded: slices.Clone(p.decoded)}
	for i := range moved.decoded {
		d := &moved.decoded[i]
		if n, err := strconv.Atoi(strings.TrimPrefix(d.Origin, origin+":")); err == nil {
			d.Origin = fmt.Sprintf("%s:%d", origin, n+by)
		}
	}
	return moved
}

// inParallel calls f for 0 to n-1, on all processors when there is much to do.
func inParallel(n int, f func(i int)) {
	const few = 16
	if n <= few {
		for i := range n {
			f(i)
		}
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), n/few+1) {
		wg.Go(func() {
			for {
				from := int(next.Add(few)) - few
				if from >= n {
					return
				}
				for i := from; i < min(from+few, n); i++ {
					f(i)
				}
			}
		})
	}
	wg.Wait()
}

type document struct {
	text []byte
	line int // of the file, from 1, where the document's first non-blank line is
}

// split cuts a YAML stream at its "---" lines (YAML 1.2, section 9.1).
func split(data []byte) []document {
	var docs []document
	start, startLine, line := 0, 1, 1
	flush := func(end int) {
		text := data[start:end]
		if trimmed := bytes.TrimLeft(text, " \t\r\n"); len(trimmed) > 0 {
			skipped := bytes.Count(text[:len(text)-len(trimmed)], []byte("\n"))
			docs = append(docs, document{text: text, line: startLine + skipped})
		}
	}
	for pos := 0; pos < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[pos:], '\n'); i >= 0 {
			end = pos + i + 1
		}
		text := bytes.TrimRight(data[pos:end], " \t\r\n")
		if bytes.Equal(text, []byte("---")) || bytes.HasPrefix(text, []byte("--- ")) {
			flush(pos)
			start, startLine = end, line+1
		}
		pos = end
	}
	flush(len(data))
	return docs
}

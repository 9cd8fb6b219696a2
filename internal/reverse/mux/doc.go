// Package mux carries many streams over one connection, in both directions, with credit
// per stream: a stream that nobody reads stops its own sender and no other one.
//
// What it has over plain multiplexers, and why it exists (docs/adr/0014): a stream that is
// cut ends with an error and never looks like one that ended well; either side can reset a
// stream with a reason; opening and its answer are one round trip; frames of several
// streams go out in one system call; an idle session costs one goroutine and no buffer.
// It knows nothing of TLS identities, targets or policy.
package mux

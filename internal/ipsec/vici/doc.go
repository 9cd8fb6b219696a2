// Package vici is a small client for the control protocol of strongSwan's IKE daemon
// ("Versatile IKE Control Interface"): length-prefixed packets over a Unix socket, with
// messages made of sections, key/values and lists.
//
// It exists because no such client is to be had as a library. It follows the protocol
// description in strongSwan's source (src/libcharon/plugins/vici/README.md) and was
// tried with 5.9.8. It knows the protocol only: what the commands mean is its user's
// business. Nothing that it returns or prints contains a value that was sent, since
// those may be keys.
package vici

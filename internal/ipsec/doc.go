// Package ipsec applies and observes IKEv2 connections in strongSwan's IKE daemon.
//
// It exists so that the rest of Culvert says which connections it wants as a value
// (netstate.IPsec) and reads back which of them carry traffic, and why the others do
// not, without knowing IKE. The daemon is a child process of ours, or one that runs
// already (Options.Socket); it survives a restart of Culvert with all its SAs and is
// adopted by the next one.
//
// Everything that users write (identities, addresses, keys) goes to the daemon in vici
// messages, where a value is a counted string of bytes. The text file that the daemon
// reads holds nothing but our own settings.
//
// The package makes no links, addresses or routes: with kernel ESP the xfrm links, and
// with kernel-libipsec the routes to ipsec0, are internal/route's.
package ipsec

//go:build !linux

package tcpconn

func saidEnd(int, uint64) bool { return true }

func readUntilNow(int) uint64 { return 0 }

//go:build !race

package nft

// raceDetector is whether the tests run with it: everything takes several times as long.
const raceDetector = false

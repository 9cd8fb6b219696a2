//go:build race

package nft

const raceDetector = true

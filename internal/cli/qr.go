package cli

import (
	"fmt"
	"io"
	"strings"

	"rsc.io/qr"

	"github.com/culvert-vpn/culvert/internal/secret"
)

// quiet is the light border around a QR code, in modules (ISO/IEC 18004 asks for 4; phones
// do with 2 on a screen).
const quiet = 2

// printQR draws a QR code with half blocks: two modules per character, dark on light, so
// that it reads on terminals of any colour.
func printQR(w io.Writer, data secret.Bytes) error {
	code, err := qr.Encode(string(data.Reveal()), qr.L)
	if err != nil {
		return fmt.Errorf("the configuration does not fit a QR code: use --file: %w", err)
	}
	var b strings.Builder
	for y := -quiet; y < code.Size+quiet; y += 2 {
		b.WriteString("\x1b[30;47m")
		for x := -quiet; x < code.Size+quiet; x++ {
			top, bottom := code.Black(x, y), code.Black(x, y+1)
			switch {
			case top && bottom:
				b.WriteString("█")
			case top:
				b.WriteString("▀")
			case bottom:
				b.WriteString("▄")
			default:
				b.WriteString(" ")
			}
		}
		b.WriteString("\x1b[0m\n")
	}
	_, err = io.WriteString(w, b.String())
	return err
}

package process

import (
	"fmt"
	"io"
	"log/slog"
)

// LogOptions are how a process logs.
type LogOptions struct {
	Level  string // "debug", "info", "warn" or "error"; empty: "info"
	Format string // "text" or "json"; empty: "text"
}

// NewLogger makes a logger that writes to w. Unknown options are errors that list the
// known ones.
func NewLogger(w io.Writer, o LogOptions) (*slog.Logger, error) {
	level, ok := map[string]slog.Level{
		"": slog.LevelInfo, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
	}[o.Level]
	if !ok {
		return nil, fmt.Errorf("log level %q: use debug, info, warn or error", o.Level)
	}
	options := &slog.HandlerOptions{Level: level}
	switch o.Format {
	case "", "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return nil, fmt.Errorf("log format %q: use text or json", o.Format)
}

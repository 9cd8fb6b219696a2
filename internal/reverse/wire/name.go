package wire

import (
	"strconv"
	"strings"
)

// HubServerName is the server name of a hub: replica 0, 1, … of the RemoteCluster with
// this UID. It derives from nothing that a user chooses, so that no tenant can ask for
// another one's. An empty domain gives the first label alone.
func HubServerName(uid string, replica int, domain string) string {
	name := "h" + strconv.Itoa(replica) + "-" + strings.ToLower(uid)
	if domain != "" {
		name += "." + domain
	}
	return name
}

// ParseHubServerName is the inverse of HubServerName; names are compared without regard
// to case. Not ok: name is not one of the domain's hubs.
func ParseHubServerName(name, domain string) (uid string, replica int, ok bool) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	label := name
	if domain != "" {
		if label, ok = strings.CutSuffix(name, "."+strings.ToLower(domain)); !ok {
			return "", 0, false
		}
	}
	number, uid, ok := strings.Cut(label, "-")
	digits, isHub := strings.CutPrefix(number, "h")
	replica, err := strconv.Atoi(digits)
	if !ok || !isHub || err != nil || uid == "" || strings.Contains(uid, ".") || strconv.Itoa(replica) != digits || replica < 0 {
		return "", 0, false
	}
	return uid, replica, true
}

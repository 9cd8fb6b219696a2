package ipsec

import (
	"time"
)

// Reason is why a connection is down, as a condition's reason.
type Reason string

// The reasons.
const (
	ReasonInvalidConfiguration      Reason = "InvalidConfiguration"         // refused by us or by our daemon
	ReasonAuthenticationFailed      Reason = "AuthenticationFailed"         // wrong key, untrusted certificate
	ReasonPeerIdentityMismatch      Reason = "PeerIdentityMismatch"         // somebody else answered or came
	ReasonCertificateExpired        Reason = "CertificateExpired"           // somewhere in the chain
	ReasonCertificateNotYetValid    Reason = "CertificateNotYetValid"       // somewhere in the chain
	ReasonCertificateRevoked        Reason = "CertificateRevoked"           // by a CRL of ours
	ReasonRevocationUnknown         Reason = "RevocationUnknown"            // no current CRL of the issuer
	ReasonNoProposalChosen          Reason = "NoProposalChosen"             // no algorithms in common
	ReasonTrafficSelectorsUnmatched Reason = "TrafficSelectorsUnacceptable" // no ranges in common
	ReasonPeerUnreachable           Reason = "PeerUnreachable"              // no answer, no route, no such name
	ReasonDatapathFailed            Reason = "DatapathFailed"               // the kernel, or libipsec, refused an SA
)

// Failure is why the last attempt at a connection failed.
type Failure struct {
	Reason  Reason
	Message string // one line: what, why, what to do
	Time    time.Time
}

func invalid(err error) Failure {
	return Failure{Reason: ReasonInvalidConfiguration, Message: err.Error(), Time: time.Now()}
}

package model

// ReasonNetworkPlugin is that the cluster's network plugin, as it is set, cannot do what an
// object asks of it. Those who can ask the cluster say so, not Parse.
const ReasonNetworkPlugin = "NetworkPlugin"

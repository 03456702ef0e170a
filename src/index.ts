/** The library: start a relay inside your own program. See examples/. */
export { Relay } from "./datapath/relay.ts";
export type {
  LaneSnapshot,
  LinkState,
  PortState,
  PortText,
  RelayEvent,
  RelayOptions,
  RelayState,
} from "./datapath/relay.ts";
export type { LaneCounters } from "./datapath/lane.ts";
export { ConfigError, ProtocolError, RelayError, SystemError } from "./errors.ts";

/** Writes examples/traffic.pcap anew: `node examples/write-traffic.ts`. */
import { writeFileSync } from "node:fs";
import { exampleCapture } from "../src/demo/frames.ts";
import { writePcap } from "../src/demo/pcap.ts";

writeFileSync(new URL("traffic.pcap", import.meta.url), writePcap(exampleCapture()));

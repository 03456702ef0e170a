/** Writes examples/traffic.pcap of a checkout anew: `node src/demo/write-example.ts`. */
import { writeFileSync } from "node:fs";
import { exampleCapture } from "./frames.ts";
import { writePcap } from "./pcap.ts";

writeFileSync(new URL("../../examples/traffic.pcap", import.meta.url), writePcap(exampleCapture()));

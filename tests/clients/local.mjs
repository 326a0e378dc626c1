// PostgREST on this machine is not below /rest/v1 as at Supabase, and Node before 22 has no WebSocket.
import ws from "ws";

globalThis.WebSocket ??= ws;
const fetch = globalThis.fetch;
globalThis.fetch = (address, init) => fetch(String(address).replace("/rest/v1", ""), init);

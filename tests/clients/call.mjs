// Each line of standard input is a request {client, token, name, args, select, get}; each line of standard output is
// what that client answered: {data, error, status}.
import { createInterface } from "node:readline";
import { PostgrestClient } from "@supabase/postgrest-js";
import { createClient } from "@supabase/supabase-js";
import ws from "ws";

const url = process.argv[2];

const clients = {
  postgrest: (token) =>
    new PostgrestClient(url, { schema: "ducto", headers: token ? { Authorization: `Bearer ${token}` } : {} }),
  supabase: (token) =>
    createClient(url, "anon key", {
      db: { schema: "ducto" },
      auth: { persistSession: false, autoRefreshToken: false },
      realtime: { transport: ws },
      global: {
        // Supabase serves PostgREST below /rest/v1, and its gateway takes an API key that is no token for nobody's.
        fetch: (address, init) => {
          if (!token) init.headers.delete("Authorization");
          return fetch(String(address).replace("/rest/v1", ""), init);
        },
        headers: token ? { Authorization: `Bearer ${token}` } : {},
      },
    }),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { client, token, name, args, select, get } = JSON.parse(line);
  let call = clients[client](token).rpc(name, args, { get });
  if (select) call = call.select(select);
  const { data, error, status } = await call;
  console.log(JSON.stringify({ data, error, status }));
}

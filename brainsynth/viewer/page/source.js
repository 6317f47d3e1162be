// Where data comes from: the server, or, on a site of files alone (viewer/static.py), scripts next to the page. A page that is
// opened from a disk may load scripts and nothing else.

const waiting = new Map();
globalThis.brainsynthFile = (key, text) => waiting.get(key)(text);

export async function ask(key) {
  if (!document.documentElement.dataset.static) return fetch(key);
  const text = await new Promise((resolve, reject) => {
    waiting.set(key, resolve);
    const script = document.createElement("script");
    script.src = `${key}.js`;
    script.onerror = () => reject(new Error(`${key}.js is missing`));
    script.onload = () => script.remove();
    document.head.append(script);
  });
  waiting.delete(key);
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}

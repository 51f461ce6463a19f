// A recorded routing.
import {el,meter,plural,table} from './elements.js';
import {D} from './ops.js';
import {heatMap} from './heatmap.js';

const decode64=(text,Type)=>new Type(Uint8Array.from(atob(text),c=>c.charCodeAt(0)).buffer);
const Q=D.routing&&{ids:decode64(D.routing.ids,Int16Array),phase:decode64(D.routing.phase,Uint8Array),layer:0,from:0,to:D.routing.tokens,phases:'all'};
const STRIP=64; // tokens in the map of tokens
function* chosen(layer){
  const{k,layers,tokens}=D.routing,L=layers.length;
  for(let t=Q.from;t<Math.min(Q.to,tokens);t++){
    if(Q.phases!=='all'&&Q.phase[t]!==+Q.phases)continue;
    const row=[];
    for(let s=0;s<k;s++){const e=Q.ids[(t*L+layer)*k+s];if(e>=0)row.push(e)}
    yield[t,row];
  }
}
function counts(layer){
  const n=new Array(D.routing.experts[layer]).fill(0);
  for(const[,row]of chosen(layer))for(const e of row)n[e]++;
  return n;
}
const loads=n=>{const s=n.reduce((a,b)=>a+b,0);return n.map(c=>s?c*n.length/s:0)};
// The load of an expert of a module, as a multiple of the mean; null without a routing of it.
const known=new Map();
export function loadOf(module,expert){
  if(!Q)return null;
  if(!known.has(module)){
    const layer=D.routing.layers.findIndex(l=>module===l||module.startsWith(`${l}.`));
    known.set(module,layer<0?null:loads(counts(layer)));
  }
  return known.get(module)?.[expert]??null;
}
const range=n=>Array.from({length:n},(_,i)=>String(i));
const short=names=>{
  const parts=names.map(n=>n.split('.'));
  const number=parts.map(p=>p.findLast(s=>/^\d+$/.test(s)));
  return new Set(number).size===names.length&&!number.includes(undefined)?number:names;
};
export function loadMap(options={}){
  const{layers,experts}=D.routing,all=layers.map((_,l)=>counts(l)),load=all.map(loads),most=Math.max(2,...load.flat());
  return heatMap({title:'Load of experts',columns:range(Math.max(...experts)),rows:short(layers),columnTitle:'expert',rowTitle:'layer',
    value:(x,y)=>x<experts[y]?load[y][x]:null,most,show:v=>v.toFixed(1),unit:'times the mean of the layer',
    tell:(x,y)=>x<experts[y]?`${layers[y]}, expert ${x}: ${plural(all[y][x],'token')}, ${load[y][x].toFixed(2)} times the mean`:'',...options});
}
export function routing(){
  const{layers,experts,tokens,of,k}=D.routing,L=layers.length;
  const maps=el('div'),lists=el('div'),tokensShown=el('span');
  const slider=(name,max,value,act)=>el('label',{},name+' ',el('input',{type:'range',min:0,max,value,'aria-label':name,oninput:e=>{act(+e.target.value);draw()}}));
  const layerBox=slider('Layer',L-1,Q.layer,v=>{Q.layer=v});
  const first=slider('First token',tokens-1,Q.from,v=>{Q.from=v;Q.to=Math.max(Q.to,v+1)});
  const last=slider('Last token',tokens-1,Q.to-1,v=>{Q.to=v+1;Q.from=Math.min(Q.from,v)});
  function draw(){
    const c=counts(Q.layer),load=loads(c),E=experts[Q.layer],rows=[...chosen(Q.layer)],strip=rows.slice(0,STRIP);
    tokensShown.textContent=`tokens ${Q.from} to ${Q.to-1}`;
    first.lastChild.value=Q.from;last.lastChild.value=Q.to-1;
    const both=Array.from({length:E},()=>new Array(E).fill(0));
    for(const[,r]of rows)for(const a of r)for(const b of r)if(a!==b)both[a][b]++;
    const list=[];
    for(let a=0;a<E;a++)for(let b=a+1;b<E;b++)if(both[a][b])list.push([a,b,both[a][b],both[a][b]*rows.length/(c[a]*c[b])]);
    list.sort((a,b)=>b[2]-a[2]);
    const pickLayer=(x,y)=>{Q.layer=y;layerBox.querySelector('input').value=y;draw()};
    maps.replaceChildren(loadMap({picked:()=>Q.layer,onpick:pickLayer}),el('h2',{},layers[Q.layer]),
      heatMap({title:`Experts of each token${rows.length>STRIP?`, the first ${STRIP}`:''}`,columns:strip.map(([t])=>String(t)),rows:range(E),columnTitle:'token',rowTitle:'expert',
        value:(x,y)=>{const at=strip[x][1].indexOf(y);return at<0?0:k-at},most:k,show:v=>v?`choice ${k-v+1}`:'not chosen',unit:'',numbers:v=>String(k-v+1),
        tell:x=>`token ${strip[x][0]}: experts ${strip[x][1].join(', ')}`}),
      k>1?heatMap({title:'Two experts in one token',columns:range(E),rows:range(E),columnTitle:'expert',rowTitle:'expert',
        value:(x,y)=>x===y?null:both[y][x],most:Math.max(1,...both.flat()),show:v=>v.toFixed(0),unit:'tokens',
        tell:(x,y)=>x===y?'':`experts ${y} and ${x}: ${plural(both[y][x],'token')} together`}):'');
    const order=c.map((v,e)=>[e,v]).sort((a,b)=>b[1]-a[1]);
    lists.replaceChildren(el('div',{class:'tiles'},
      el('div',{},el('h3',{},'Load'),table(['#expert','#tokens','#load / mean',''],order,([e,v])=>[e,v,load[e].toFixed(2),meter(load[e]/Math.max(1,...load))])),
      k>1?el('div',{},el('h3',{},'Together in one token'),table(['experts','#tokens','#times chance'],list.slice(0,20),([a,b,v,x])=>[`${a}, ${b}`,v,x.toFixed(2)])):''));
  }
  draw();
  return[el('p',{},`${plural(of,'token')}${of>tokens?`, of which the first ${tokens.toLocaleString('en')} are here`:''}; ${plural(L,'layer')}, ${[...new Set(experts)].join(' or ')} experts, ${k} per token.`),
    el('div',{class:'tools'},layerBox,first,last,
      el('label',{},'Phase ',el('select',{onchange:e=>{Q.phases=e.target.value;draw()}},...[['all','prefill and decode'],['0','prefill'],['1','decode']].map(([v,t])=>el('option',{value:v,selected:v===Q.phases},t)))),tokensShown),
    maps,lists];
}
